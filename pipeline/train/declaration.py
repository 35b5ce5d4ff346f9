"""Declares the train stage to the rest of the pipeline."""

from __future__ import annotations

from typing import Any

from capgap.pipeline.stage.context import Instance, further_cache, text_of_cache
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import cache_inputs, corpus_inputs, trainings
from capgap.pipeline.stage.rounds import own_cache, replayed, rounds_of, weights_before, writer_of
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings


def _settings_of(run: RunFile, instance: Instance) -> TrainSettings:
    assert instance.arm is not None
    return run.train_settings(instance.arm, instance.round)


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    online = ["teacher"] if _settings_of(run, instance).needs_teacher else []
    if instance.round is None:
        return [*corpus_inputs(run), *online, *cache_inputs(run), Instance("student", seed=instance.seed).name]
    # A round's cache holds both the text of the round and its held-out sequences, so no corpus is read.
    return list(dict.fromkeys([*online, *_roles(run, instance)]))


def _roles(run: RunFile, instance: Instance) -> dict[str, str]:
    """Return, in a run with rounds, the names under which a training reads its inputs, by the inputs' own names.

    They are the names that inputs have in a run without rounds, such as `cache` for the cache of the round.
    """
    if instance.round is None:
        return {}
    earlier = {cache.name: further_cache(name) for name, cache in replayed(run, instance).items()}
    # The text of each cache is an input too where a student wrote it: it holds the writer's logprobs.
    mix: list[tuple[str | None, Instance]] = [(None, own_cache(run, instance)), *replayed(run, instance).items()]
    texts = {name: Instance("generate", cache.arm, cache.seed, cache.round) for name, cache in mix}
    earlier |= {text.name: text_of_cache(name) for name, text in texts.items() if writer_of(text) == "student"}
    first = Instance("student", seed=instance.seed).name
    return earlier | {own_cache(run, instance).name: "cache", weights_before(instance).name: first}


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    found = {"train": _settings_of(run, instance).decisive(), "arm": instance.arm, "seed": instance.seed}
    if not instance.round or not rounds_of(run).replay:
        return found
    return found | {"replay": rounds_of(run).replay}


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
    roles=_roles,
    settings=_decisive,
    further=_further,
    on_device=True,
    is_costly=lambda run, instance: True,
    training=_settings_of,
    preflight="capgap.pipeline.train.preflight:require_trainable",
    may_skip_quarantined=lambda run, instance: _settings_of(run, instance).on_corrupt == "skip",
)
