"""A run with rounds whose first stages are made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from round_runs import make, run_of, settings_of

from capgap.schemas.run_file import RunFile


@pytest.fixture(scope="session")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run whose corpus, teacher and student are made."""
    settings = settings_of(tmp_path_factory.mktemp("begun"))
    make(run_of(settings), "corpus", "teacher", "student/seed-1")
    return settings


@pytest.fixture
def make_rounds(begun: dict[str, Any], tmp_path: Path) -> Callable[..., RunFile]:
    """The run in a folder of its own, with other settings of its rounds."""
    shutil.copytree(begun["out"], tmp_path / "out")

    def made(settings: dict[str, Any] | None = None, **rounds: Any) -> RunFile:
        return run_of(begun | {"out": str(tmp_path / "out")} | (settings or {}), **rounds)

    return made
