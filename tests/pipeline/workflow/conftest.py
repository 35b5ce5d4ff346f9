"""Run files for the stage graph, and stage folders that the real functions finish."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.workflow.folder import begin, content_files, finish
from capgap.pipeline.workflow.identity import content_of
from capgap.pipeline.workflow.state import StageState, states
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

BASE: dict[str, Any] = {
    "name": "tried",
    "seeds": [0, 1],
    "teacher": {"model": {"hidden_size": 64, "num_heads": 4}, "training": {"learning_rate": 1e-3}},
    "student": {"model": {"hidden_size": 32, "num_heads": 4}},
    "arms": {"distilled": {}, "cross_entropy": {"alpha": 0}},
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFile]:
    """A run file with some settings changed, each by its dotted name."""

    def make(settings: dict[str, Any] | None = None) -> RunFile:
        values = copy.deepcopy(BASE) | {"out": str(tmp_path / "out")}
        for path, value in (settings or {}).items():
            *parents, name = path.split(".")
            place = values
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = copy.deepcopy(value)
        return RunFile.model_validate(values)

    return make


@pytest.fixture
def make_finished() -> Callable[..., Manifest]:
    """Finish an instance's folder with one file of the given text, as `carry_out` would."""

    def make(run: RunFile, name: str, text: str = "result") -> Manifest:
        state: StageState = states(run)[name]
        state.folder.mkdir(parents=True, exist_ok=True)
        begin(state.folder, state.order)
        (state.folder / "result.txt").write_text(text)
        files = content_files(state.folder)
        manifest = Manifest(
            **state.order.model_dump(),
            content=content_of(files),
            files=files,
            versions={},
            started="2026-01-01T00:00:00+00:00",
            wall_s=0.0,
            command=(),
        )
        return finish(state.folder, manifest)

    return make
