"""What the rest of the pipeline knows of the eval stage."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import cache_inputs, corpus_inputs, names, once, teacher_inputs, trainings
from capgap.schemas.run_file import RunFile


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    return [*corpus_inputs(run), *teacher_inputs(run), *cache_inputs(run), *names(trainings(run))]


STAGE = Stage(
    name="eval",
    help="measure teacher and students on held-out text",
    code="capgap.pipeline.eval.stage",
    section="eval",
    instances=lambda run: once("eval", "eval", run),
    inputs=_inputs,
    settings=lambda run, instance: {"eval": run.eval.decisive()},
    on_device=True,
    preflight="capgap.pipeline.eval.preflight:require_measurable",
    # held-out shards in quarantine are not measured on, others not read
    may_skip_quarantined=lambda run, instance: True,
)
