"""The eval stage's declaration: what the rest of the pipeline knows about it."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import (
    cache_inputs,
    corpus_inputs,
    final_trainings,
    names,
    once,
    teacher_inputs,
    usual_roles,
)
from capgap.schemas.run_file import RunFile


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    return [*corpus_inputs(run), *teacher_inputs(run), *cache_inputs(run), *names(final_trainings(run))]


STAGE = Stage(
    name="eval",
    help="measure teacher and students on held-out text",
    code="capgap.pipeline.eval.stage",
    section="eval",
    instances=lambda run: once("eval", "eval", run),
    inputs=_inputs,
    roles=usual_roles,
    settings=lambda run, instance: {"eval": run.eval.decisive()},
    on_device=True,
    preflight="capgap.pipeline.eval.preflight:require_measurable",
    # held-out shards in quarantine are not used, and the stage reads no other shards of the cache
    may_skip_quarantined=lambda run, instance: True,
)
