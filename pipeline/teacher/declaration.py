"""The declaration of the teacher stage, which is all that the rest of the pipeline knows about it."""

from __future__ import annotations

from capgap.pipeline.stage.declaration import Engines, Stage
from capgap.pipeline.stage.instances import once
from capgap.pipeline.stage.sources import model_files

STAGE = Stage(
    name="teacher",
    help="check a given teacher, adapt it, or train a small one",
    code="capgap.pipeline.teacher.stage",
    section="teacher",
    instances=lambda run: once("teacher", "teacher", run),
    inputs=lambda run, instance: (
        (["corpus"] if run.has("corpus") else []) or (["cache"] if "cache" in run.reuse else [])
    ),
    settings=lambda run, instance: {"teacher": run.teacher.decisive()},
    sources=lambda run, instance: model_files(run.teacher.path),
    on_device=True,
    is_costly=lambda run, instance: run.teacher.optimization is not None,
    engines=lambda run: Engines(num_devices=0 if run.teacher.served is not None else 1),
    training=lambda run, instance: run.teacher.optimization,
    preflight="capgap.pipeline.models.preflight:require_teacher",
)
