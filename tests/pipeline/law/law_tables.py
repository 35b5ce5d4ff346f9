"""Tables of runs with a known truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from capgap.schemas.law import LawCache, LawModel, LawRun, LawTeacher

Truth = Callable[[float, float], float]

TEACHER_TOKENS_PER_PARAMETER = 20


def size(num_parameters: float, name: str = "") -> LawModel:
    count = round(num_parameters)
    return LawModel(name=name or f"m{count}", num_parameters=count, num_non_embedding_parameters=count)


def teacher(num_parameters: float, loss: float | None = None, **changes: object) -> LawTeacher:
    count = round(num_parameters)
    facts = {
        "name": f"t{count}",
        "num_parameters": count,
        "num_non_embedding_parameters": count,
        "loss": loss if loss is not None else 2.0 + 40.0 * count**-0.25,
        "train_tokens": TEACHER_TOKENS_PER_PARAMETER * count,
    }
    return LawTeacher.model_validate(facts | changes)


def cache(tutor: LawTeacher, **changes: object) -> LawCache:
    facts = {"identity": f"cache of {tutor.name}", "recording": "sampled", "num_ids": 50, "temperature": 1.0}
    return LawCache.model_validate(facts | {"num_tokens": 2_000_000} | changes)


def run(student: LawModel, tutor: LawTeacher | None, seed: int, loss: float | None, **changes: object) -> LawRun:
    facts: dict[str, object] = {
        "student": student,
        "teacher": tutor,
        "cache": cache(tutor) if tutor else None,
        "budget": "2M",
        "tokens": 2_000_000,
        "alpha": 1.0 if tutor else 0.0,
        "arm": "distilled" if tutor else "cross_entropy",
        "seed": seed,
        "loss": loss,
        "common": {"tokenizer": "abc", "heldout": "def"},
        "per_student": {"learning_rate": 1e-3},
    }
    return LawRun.model_validate(facts | changes)


def planted(
    truth: Truth,
    students: Sequence[float],
    ratios: Sequence[float],
    num_seeds: int = 3,
    noise: float = 0.002,
    seed: int = 0,
) -> tuple[LawRun, ...]:
    """A complete grid: loss = truth(teacher size, student size) + the seed's own luck + noise.

    The seed's luck has ten times the spread of the noise, as measured for small models; only paired runs show anything.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in students:
        student = size(number)
        for one in range(num_seeds):
            luck = rng.normal(0, 10 * noise)
            rows.append(run(student, None, one, 4.2 + luck + rng.normal(0, noise)))
            for ratio in ratios:
                tutor = teacher(ratio * number)
                loss = truth(tutor.num_parameters, student.num_parameters) + luck + rng.normal(0, noise)
                rows.append(run(student, tutor, one, loss))
    return tuple(rows)


def valley(ratio: float, bend: float = 0.01) -> Truth:
    """A parabola in the logarithm of teacher over student."""
    return lambda t, s: 4.0 + bend * float(np.log(t / s / ratio)) ** 2
