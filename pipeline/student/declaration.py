"""Declares the student stage to the rest of the pipeline."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import students, text_inputs
from capgap.pipeline.stage.sources import model_files
from capgap.schemas.run_file import RunFile


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    return [*text_inputs(run), *([] if run.student.prune is None else ["teacher"])]


STAGE = Stage(
    name="student",
    help="make the student's first weights: fresh, given, or pruned from the teacher",
    code="capgap.pipeline.student.stage",
    section="student",
    instances=students,
    inputs=_inputs,
    settings=lambda run, instance: {"student": run.student.decisive(), "seed": instance.seed},
    sources=lambda run, instance: model_files(run.student.path),
    on_device=True,
    preflight="capgap.pipeline.student.preflight:require_student",
)
