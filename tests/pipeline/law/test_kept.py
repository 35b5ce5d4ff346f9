"""What a grid has begun is not begun anew because a setting was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.law.expand import corpus_run
from capgap.pipeline.law.kept import require_corpus_kept
from capgap.pipeline.stage.folder import WORK_FOLDER, begin, plan_units
from capgap.pipeline.workflow.state import states
from capgap.schemas.errors import MismatchError
from capgap.schemas.law_grid import LawGrid

MODEL = {"model": {"hidden_size": 32, "num_heads": 2}}


def _grid(out: Path, **corpus: Any) -> LawGrid:
    models = {"teachers": {"t": MODEL}, "students": {"s": MODEL}, "budgets": {"short": {"tokens": 1000}}}
    return LawGrid.model_validate({"name": "g", "out": str(out), "corpus": {"seq_len": 32} | corpus} | models)


def test_a_corpus_that_is_half_made_under_other_settings_is_refused_with_the_grid_s_own_flag(tmp_path: Path) -> None:
    grid = _grid(tmp_path)
    state = states(corpus_run(grid))["corpus"]
    state.folder.mkdir(parents=True)
    begin(state.folder, state.order)
    plan_units(state.folder / WORK_FOLDER, "units", 4, "unit-*")
    (state.folder / WORK_FOLDER / "unit-0").touch()
    require_corpus_kept(grid)
    with pytest.raises(MismatchError, match=r"corpus \(unfinished, corpus.seq_len was 32, is 64\).* with --replace"):
        require_corpus_kept(_grid(tmp_path, seq_len=64))
