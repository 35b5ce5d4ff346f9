"""What the rest of the pipeline knows of the cache stage."""

from __future__ import annotations

from capgap.pipeline.stage.declaration import Engines, Stage
from capgap.pipeline.stage.instances import once

STAGE = Stage(
    name="cache",
    help="score the corpus with the teacher and keep its distributions as shards",
    code="capgap.pipeline.cache.stage",
    section="cache",
    instances=lambda run: once("cache", "cache", run),
    inputs=lambda run, instance: ["corpus", "teacher"],
    settings=lambda run, instance: {"cache": run.cache.decisive()},
    on_device=True,
    is_costly=lambda run, instance: True,
    engines=lambda run: Engines(run.cache.replicas, run.cache.num_devices),
    is_sliced=True,
    preflight="capgap.pipeline.cache.preflight:require_engine",
)
