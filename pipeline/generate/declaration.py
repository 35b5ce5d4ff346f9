"""What the rest of the pipeline knows of the generate stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capgap.pipeline.stage.context import FINAL, Instance
from capgap.pipeline.stage.declaration import Engines, Stage
from capgap.pipeline.stage.rounds import last_texts, rounds_of, texts, writer_of, writing
from capgap.schemas.run_file import RunFile

WRITER = "writer"
"""The role of the model that writes."""


def _instances(run: RunFile) -> list[Instance]:
    return [*texts(run), *last_texts(run)] if run.makes("rounds") else []


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    # the teacher is an input even if a student writes: it fixes how answers end, and it scores them later
    return list(dict.fromkeys(["corpus", "teacher", writing(run, instance).name]))


def _roles(run: RunFile, instance: Instance) -> Mapping[str, str]:
    return {writing(run, instance).name: WRITER} if writer_of(instance) == "student" else {}


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    return {"rounds": rounds_of(run).text_settings(), "seed": instance.seed, "round": instance.round}


def _sources(run: RunFile, instance: Instance) -> list[Path]:
    # imported here: a command that only reads manifests does not read prompts
    from capgap.pipeline.generate.prompts import prompt_files

    return prompt_files(rounds_of(run).prompts)


STAGE = Stage(
    name="generate",
    help="let a model of the run write text in answer to prompts",
    code="capgap.pipeline.generate.stage",
    section="rounds",
    instances=_instances,
    inputs=_inputs,
    roles=_roles,
    settings=_decisive,
    sources=_sources,
    on_device=True,
    # the final students write little text, and it is made again after every further round
    is_costly=lambda run, instance: instance.round != FINAL,
    engines=lambda run: Engines(rounds_of(run).replicas, rounds_of(run).tensor_parallel),
    is_sliced=True,
    preflight="capgap.pipeline.generate.preflight:require_writable",
)
