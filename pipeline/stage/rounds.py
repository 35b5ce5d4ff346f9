"""The instances of a run with rounds: who writes each text, which caches score it, and which trainings learn from it.

    teacher writes:      generate/round-0                        for all arms and seeds
    first weights write: generate/seed-0/round-0                 for all arms of a seed
    a training writes:   generate/distilled/seed-0/round-1       for itself
    a final one writes:  generate/distilled/seed-0/final         to be measured; nobody learns from it

A text's cache has the text's name, with the stage `cache`. The training of a round reads the round's cache, the weights
of the round before and, with `replay`, the caches of the rounds before.
"""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.stage.context import FINAL, Instance
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_rounds import RoundsSettings, Writer


def rounds_of(run: RunFile) -> RoundsSettings:
    """Return the settings of the rounds, in a run that has them."""
    assert run.rounds is not None, "asked of a run without rounds"
    return run.rounds


def text_of(run: RunFile, arm: str, seed: int, number: int) -> Instance:
    """Return the text that an arm learns from in a round."""
    rounds = rounds_of(run)
    if arm in rounds.off_policy_arms or (number == 0 and rounds.first_writer == "teacher"):
        return Instance("generate", round=number)
    if number == 0:
        return Instance("generate", seed=seed, round=0)
    return Instance("generate", arm, seed, number)


def cache_of(text: Instance) -> Instance:
    """Return the cache of a text."""
    return Instance("cache", text.arm, text.seed, text.round)


def texts(run: RunFile) -> list[Instance]:
    """Return every text that a training learns from, each once."""
    return list(dict.fromkeys(text_of(run, *which) for which in _trainings(run)))


def last_texts(run: RunFile) -> list[Instance]:
    """Return the texts that the final students write in answer to held-out prompts, where the run measures anything."""
    if not run.makes("eval"):
        return []
    return [Instance("generate", arm, seed, FINAL) for seed in run.seeds for arm in run.arms]


def round_trainings(run: RunFile) -> list[Instance]:
    """Return every training of a run with rounds."""
    return [Instance("train", *which) for which in _trainings(run)]


def last_trainings(run: RunFile) -> list[Instance]:
    """Return the trainings of the last round."""
    return [one for one in round_trainings(run) if one.round == rounds_of(run).num - 1]


def weights_before(instance: Instance) -> Instance:
    """Return what made the weights that a training starts from, or that write its round's text; not for final texts."""
    assert instance.seed is not None and instance.round is not None
    if instance.round == 0:
        return Instance("student", seed=instance.seed)
    return Instance("train", instance.arm, instance.seed, instance.round - 1)


def writer_of(text: Instance) -> Writer:
    """Return whether the teacher or a student writes the text."""
    return "teacher" if text.seed is None else "student"


def writing(run: RunFile, text: Instance) -> Instance:
    """Return the instance that made the model which writes the text."""
    if text.round == FINAL:
        return Instance("train", text.arm, text.seed, rounds_of(run).num - 1)
    return Instance("teacher") if text.seed is None else weights_before(text)


def own_cache(run: RunFile, training: Instance) -> Instance:
    """Return the cache of the text that a training learns from in its round."""
    assert training.arm is not None and training.seed is not None and training.round is not None
    return cache_of(text_of(run, training.arm, training.seed, training.round))


def replayed(run: RunFile, training: Instance) -> dict[str, Instance]:
    """Return the caches of earlier rounds that a training reads too, by their names in the mix."""
    assert training.arm is not None and training.seed is not None and training.round is not None
    if not rounds_of(run).replay:
        return {}
    return {
        f"round-{number}": cache_of(text_of(run, training.arm, training.seed, number))
        for number in range(training.round)
    }


def shared_cache(run: RunFile) -> Instance:
    """Return the cache on whose held-out sequences all students are measured alike: of the first text of round 0."""
    return cache_of(texts(run)[0])


def _trainings(run: RunFile) -> Iterator[tuple[str, int, int]]:
    for seed in run.seeds:
        for arm in run.arms:
            for number in range(rounds_of(run).num):
                yield arm, seed, number
