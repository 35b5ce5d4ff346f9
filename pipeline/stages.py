"""The list of stages, in the order in which a run makes them. A new stage needs its own folder, and one line here.

Each name is a folder beside this file, whose `declaration.py` holds its `STAGE`. Nothing else in the pipeline names the
stages: graph, identities, leases, commands, help, status and plan are derived from the declarations.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from pydantic import Field, create_model

from capgap.pipeline.stage.declaration import Stage
from capgap.schemas.run_file import RunFile

FOLDERS = (
    "capgap.pipeline.corpus",
    "capgap.pipeline.teacher",
    "capgap.pipeline.generate",
    "capgap.pipeline.cache",
    "capgap.pipeline.align",
    "capgap.pipeline.student",
    "capgap.pipeline.train",
    "capgap.pipeline.tune",
    "capgap.pipeline.eval",
    "capgap.pipeline.benchmark",
    "capgap.pipeline.answers",
    "capgap.pipeline.judge",
    "capgap.pipeline.report",
)


def declared() -> tuple[Stage, ...]:
    """Return the declaration of every stage, in the order of a run."""
    return tuple(_declaration(folder) for folder in FOLDERS)


def stage_named(name: str) -> Stage:
    """Return the declaration of the stage with this name."""
    return next(stage for stage in declared() if stage.name == name)


def run_file_type() -> type[RunFile]:
    """Return the model of the run file, with one more section for each stage that brings settings of its own."""
    own = {stage.section: stage.settings_type for stage in declared() if stage.settings_type is not None}
    if not own:
        return RunFile
    fields: dict[str, Any] = {name: (kind, Field(default_factory=kind)) for name, kind in own.items()}
    extended: type[RunFile] = create_model("RunFile", __base__=RunFile, **fields)
    return extended


@cache
def _declaration(folder: str) -> Stage:
    stage: Stage = importlib.import_module(f"{folder}.declaration").STAGE
    return stage
