"""What the rest of the pipeline knows of the train stage."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.stage.context import Instance, further_cache
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import cache_inputs, corpus_inputs, trainings
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings


def _settings_of(run: RunFile, instance: Instance) -> TrainSettings:
    assert instance.arm is not None
    return run.train_settings(instance.arm)


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    online = ["teacher"] if _settings_of(run, instance).needs_teacher else []
    return [*corpus_inputs(run), *online, *cache_inputs(run), Instance("student", seed=instance.seed).name]


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    return {"train": _settings_of(run, instance).decisive(), "arm": instance.arm, "seed": instance.seed}


def _further(run: RunFile, instance: Instance) -> dict[str, str]:
    caches = _settings_of(run, instance).caches
    return {further_cache(name): cache.path for name, cache in caches.items() if cache.path is not None}


STAGE = Stage(
    name="train",
    help="train the student from the cache",
    code="capgap.pipeline.train.stage",
    section="train",
    instances=trainings,
    inputs=_inputs,
    settings=_decisive,
    further=_further,
    on_device=True,
    is_costly=lambda run, instance: True,
    training=_settings_of,
    preflight="capgap.pipeline.train.preflight:require_trainable",
    may_skip_quarantined=lambda run, instance: _settings_of(run, instance).on_corrupt == "skip",
)
