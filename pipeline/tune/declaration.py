"""Declares the tune stage to the rest of the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capgap.pipeline.stage.context import CHAT_CACHE, Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import cache_inputs, final_trainings, tunings, usual_roles
from capgap.pipeline.stage.sources import model_files
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_tune import OWN_CACHE


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    assert run.tune is not None
    looked_for = (instance.arm, instance.seed)
    students = [one.name for one in final_trainings(run) if (one.arm, one.seed) == looked_for]
    own = cache_inputs(run) if run.tune.cache == OWN_CACHE else []
    return [*([] if run.tune.path is not None else students), *own]


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    assert run.tune is not None
    return {"tune": run.tune.decisive(), "arm": instance.arm, "seed": instance.seed}


def _further(run: RunFile, instance: Instance) -> dict[str, str]:
    assert run.tune is not None
    return {} if run.tune.cache in (None, OWN_CACHE) else {CHAT_CACHE: str(run.tune.cache)}


def _sources(run: RunFile, instance: Instance) -> list[Path]:
    # imported here because a command that only reads manifests should not import a Parquet reader
    from capgap.pipeline.tune.files import chat_files

    assert run.tune is not None
    template = Path(run.tune.chat_template or "")
    chats = chat_files(run.tune) if run.tune.sources else []
    here = [file for file in chats if isinstance(file, Path)]
    return [*here, *([template] if template.is_file() else []), *model_files(run.tune.path)]


STAGE = Stage(
    name="tune",
    help="make a chat model of a trained student",
    code="capgap.pipeline.tune.stage",
    section="tune",
    instances=tunings,
    inputs=_inputs,
    roles=usual_roles,
    settings=_decisive,
    sources=_sources,
    further=_further,
    on_device=True,
    is_costly=lambda run, instance: True,
    training=lambda run, instance: run.tune,
    preflight="capgap.pipeline.tune.preflight:require_tunable",
)
