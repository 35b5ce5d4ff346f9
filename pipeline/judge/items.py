"""The items to judge: each answer alone, or each pair of answers in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Literal

from capgap.pipeline.judge.prompts import Messages, messages_for
from capgap.pipeline.stage.identity import digest_of
from capgap.schemas.judge_results import Answered, Item, Kind

_TURNS: tuple[Literal[1, 2], ...] = (1, 2)


@dataclass(frozen=True)
class Model:
    """A model whose answers are judged.

    Attributes:
        name: name of the instance that made the model, for example `train/distilled/seed-0`.
        arm: the arm of a student; None for the teacher, or where the run has no arms.
        seed: the seed of a student; None for the teacher.
    """

    name: str
    arm: str | None
    seed: int | None


@dataclass(frozen=True)
class Task:
    """An item to judge, and the messages that ask the judge about it."""

    item: Item
    messages: Messages

    @cached_property
    def key(self) -> str:
        """Digest of the item and the messages, of 32 hexadecimal digits."""
        return digest_of([self.item.model_dump(mode="json"), list(self.messages)])[:32]


Answers = Mapping[Model, Sequence[Answered]]
"""The answers of every model to the same questions in the same order."""


def tasks(answers: Answers, modes: Sequence[str]) -> list[Task]:
    """Return all tasks of the given modes, `single` and `pairwise`; each model's or pair's are in question order."""
    found: list[Task] = []
    if "single" in modes:
        for model, answered in answers.items():
            found += [_task("single", (model,), (one,), turn) for one in answered for turn in _TURNS]
    if "pairwise" in modes:
        for pair in pairs(list(answers)):
            for models in (pair, pair[::-1]):
                both = zip(*(answers[model] for model in models), strict=True)
                found += [_task("pairwise", models, answered, turn) for answered in both for turn in _TURNS]
    return found


def pairs(models: Sequence[Model]) -> Iterator[tuple[Model, Model]]:
    """Yield each pair of models with the same seed, and each student with the teacher, which comes second."""
    for first, second in combinations(models, 2):
        if first.seed is None:
            yield second, first
        elif second.seed is None or first.seed == second.seed:
            yield first, second


def _task(kind: Kind, models: Sequence[Model], answered: Sequence[Answered], turn: Literal[1, 2]) -> Task:
    question = answered[0].question
    item = Item(
        kind=kind,
        question_id=question.question_id,
        category=question.category,
        turn=turn,
        models=tuple(model.name for model in models),
    )
    return Task(item, messages_for(answered, turn))
