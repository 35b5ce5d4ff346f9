"""What people share: rows with their provenance, and points of papers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from law_tables import planted, valley

from capgap.pipeline.law.fit import fit_table, read_fit, write_fit
from capgap.pipeline.law.page import render_page
from capgap.pipeline.law.shared import read_published, read_submission, write_submission
from capgap.pipeline.law.summary import lines
from capgap.pipeline.law.table import write_table
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.law import LawRun
from capgap.schemas.law_grid import LawGrid

RATIOS = np.geomspace(1, 32, 6).tolist()
PUBLIC = Path(__file__).parents[3] / "docs" / "results" / "public-law.yaml"


def submitted(folder: Path, runs: list[LawRun]) -> Path:
    folder.mkdir()
    write_table(folder / "runs.jsonl", runs)
    shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    models = {"teachers": {"t": {"model": shape}}, "students": {"s": {"model": shape}}}
    grid = LawGrid.model_validate(
        {"name": "g", "out": str(folder), "device": "cpu", "budgets": {"b": {"tokens": 10}}} | models
    )
    write_submission(grid, folder / "runs.jsonl", folder / "submission.json")
    return folder / "submission.json"


def test_rows_of_others_join_the_table_and_count_as_seeds(tmp_path: Path) -> None:
    runs = planted(valley(4.0), [1e6], RATIOS, num_seeds=5)
    theirs = submitted(tmp_path / "theirs", [run for run in runs if run.seed > 2])
    write_table(tmp_path / "runs.jsonl", [run for run in runs if run.seed <= 2])
    law = fit_table(tmp_path / "runs.jsonl", added=[theirs])
    assert law.curves[0].seeds == (0, 1, 2, 3, 4) and law.num_runs == len(runs)
    assert law.added == {str(theirs): sha256_of(theirs)}
    assert str(theirs) in render_page(law)
    with pytest.raises(InputError, match="one run stands in the table twice"):
        fit_table(tmp_path / "theirs" / "runs.jsonl", added=[theirs])


def test_rows_of_another_corpus_do_not_join(tmp_path: Path) -> None:
    runs = planted(valley(4.0), [1e6], RATIOS)
    other = [run.model_copy(update={"seed": run.seed + 3, "common": run.common | {"heldout": "x"}}) for run in runs]
    write_table(tmp_path / "runs.jsonl", runs)
    with pytest.raises(MismatchError, match="heldout differs within one grid"):
        fit_table(tmp_path / "runs.jsonl", added=[submitted(tmp_path / "theirs", other)])


def test_a_submission_has_only_runs_with_a_result_and_says_where_it_was_made(tmp_path: Path) -> None:
    runs = planted(valley(4.0), [1e6], RATIOS)
    lost = runs[-1].model_copy(update={"loss": None, "missing": "not made yet"})
    submission = read_submission(submitted(tmp_path / "theirs", [*runs[:-1], lost]))
    assert submission.rows == runs[:-1] and submission.machine and submission.name == "g"
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(InputError, match="not a submission"):
        read_submission(tmp_path / "no.json")
    with pytest.raises(InputError, match="no run has a result yet"):
        submitted(tmp_path / "none", [run.model_copy(update={"loss": None, "missing": "killed"}) for run in runs])


def test_points_of_papers_are_shown_and_the_rules_are_scored_on_them(tmp_path: Path) -> None:
    write_table(tmp_path / "runs.jsonl", planted(valley(4.0), [1e6], RATIOS))
    law = fit_table(tmp_path / "runs.jsonl", published=PUBLIC)
    rules = {rule.name: rule for rule in law.published_rules}
    assert rules["law of capacity gap"].regret == 0.0 and rules["largest teacher"].regret == 1.0
    assert rules["law of capacity gap"].outside == ()
    assert "distillation scaling law" not in rules, "it needs the teachers' losses"
    assert any("largest teacher: 100%, MiniMA-3B LLaMA-2-70B (missed)" in line for line in lines(law))
    page = render_page(law)
    assert "MiniMA-3B" in page and "2.23 x the student" in page
    assert read_fit(write_fit(tmp_path, law)) == law


def test_a_published_result_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    values = yaml.safe_load(PUBLIC.read_text())
    result = values["results"][0]
    for changes, said in (
        ({"best": "GPT-2"}, "found 'GPT-2', expected one of LLaMA-2-"),
        ({"teachers": {"a": {"size": 1, "score": 1}, "b": {"size": 2}}, "best": "a"}, "expected all or none"),
        (
            {"teachers": {n: {"size": 1 + s, "score": s} for n, s in (("a", 1), ("b", 2), ("c", 3))}, "best": "b"},
            "the best at an end",
        ),
    ):
        (tmp_path / "public.yaml").write_text(yaml.safe_dump({"results": [result | changes]}))
        with pytest.raises(InputError, match=said):
            read_published(tmp_path / "public.yaml")
    with pytest.raises(InputError, match="no such file"):
        read_published(tmp_path / "none.yaml")
