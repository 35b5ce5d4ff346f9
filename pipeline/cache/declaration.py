"""The declaration of the cache stage, which is all that the rest of the pipeline knows about it."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Engines, Stage
from capgap.pipeline.stage.instances import caches
from capgap.schemas.run_file import RunFile


def _text(instance: Instance) -> str:
    """Return the name of the stage whose text is scored: the corpus, or the generate stage of the same round."""
    if instance.round is None:
        return "corpus"
    return Instance("generate", instance.arm, instance.seed, instance.round).name


def _roles(run: RunFile, instance: Instance) -> dict[str, str]:
    return {_text(instance): "corpus"}


STAGE = Stage(
    name="cache",
    help="score the corpus with the teacher and keep its distributions as shards",
    code="capgap.pipeline.cache.stage",
    section="cache",
    instances=caches,
    inputs=lambda run, instance: [_text(instance), "teacher"],
    roles=_roles,
    settings=lambda run, instance: {"cache": run.cache.decisive()},
    on_device=True,
    is_costly=lambda run, instance: True,
    engines=lambda run: Engines(run.cache.replicas, run.cache.num_devices),
    is_sliced=True,
    preflight="capgap.pipeline.cache.preflight:require_engine",
)
