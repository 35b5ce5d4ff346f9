"""What the published laws predict for a student and for the teachers that could be chosen, in words and as data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.plan.published import (
    CAPACITY_GAP,
    CHINCHILLA_TOKENS_PER_PARAMETER,
    DISTILLATION_SCALING,
    GAP_SLOPE,
    LOOKED_AT,
    NEAR,
    GivenTeacher,
    PublishedLaw,
    ScalingBest,
    distilled_loss,
    gap_best_teacher,
    scaling_best_teacher,
    supervised_loss,
)
from capgap.schemas.law_prediction import Prediction


def predictions(student: float, tokens: float, teachers: Sequence[GivenTeacher]) -> tuple[Prediction, ...]:
    """Return the predictions of both laws.

    Args:
        student: Number of the student's parameters.
        tokens: Number of tokens that the student is trained on.
        teachers: The teachers that could be chosen; may be empty.
    """
    return gap_prediction(student, tokens, teachers), scaling_prediction(student, tokens, teachers)


def gap_prediction(student: float, tokens: float, teachers: Sequence[GivenTeacher]) -> Prediction:
    """Return the prediction of the law of capacity gap, whose paper counts all parameters."""
    best = gap_best_teacher(student)
    if best is None:
        summary = (
            f"2.498 S - 11.498M is below the student's own size for S = {human_count(student)}: no prediction; "
            f"its slope alone would give {human_count(GAP_SLOPE * student)}"
        )
    else:
        chosen = nearest(teachers, best)
        at_hand = f"; nearest: {chosen.name}, {chosen.size / student:.2f} x" if chosen else ""
        summary = f"2.498 S - 11.498M = {human_count(best)}, {best / student:.2f} x the student{at_hand}"
    return _prediction(CAPACITY_GAP, student, tokens, teachers, best, summary)


def scaling_prediction(student: float, tokens: float, teachers: Sequence[GivenTeacher]) -> Prediction:
    """Return the prediction of the distillation scaling law, whose paper counts parameters without embeddings."""
    ratios = [teacher.tokens / teacher.size for teacher in teachers if teacher.tokens]
    ratio = statistics.median(ratios) if ratios else CHINCHILLA_TOKENS_PER_PARAMETER
    losses = {
        teacher.name: distilled_loss(
            student, tokens, supervised_loss(teacher.size, teacher.tokens or ratio * teacher.size)
        )
        for teacher in teachers
    }
    best = scaling_best_teacher(student, tokens, ratio)
    trained = "the median given" if ratios else "an assumption, none was given"
    summary = f"{_best(best, student)}, for teachers trained on {ratio:.3g} tokens a parameter ({trained})"
    if losses:
        over_student = {teacher.name: teacher.size / student for teacher in teachers}
        summary = f"{summary}; {_at_hand(losses, over_student, supervised_loss(student, tokens))}"
    size = None if best.ratio is None else best.ratio * student
    return _prediction(DISTILLATION_SCALING, student, tokens, teachers, size, summary, losses)


def nearest(teachers: Sequence[GivenTeacher], size: float) -> GivenTeacher | None:
    """Return the teacher whose size is nearest to `size` as a ratio; None where there is no teacher."""
    return min(teachers, key=lambda teacher: abs(math.log(teacher.size / size)), default=None)


def _best(best: ScalingBest, student: float) -> str:
    """Say at which teacher's size the loss is lowest; an end of the searched range is not called an optimum."""
    if best.end == "smallest":
        return f"best at or below {LOOKED_AT[0]:g} x the student, the smallest teacher looked at"
    if best.end == "largest":
        return f"best at or beyond {LOOKED_AT[1]:g} x the student, the largest teacher looked at"
    assert best.ratio is not None
    (least, largest), (first, last) = best.within, LOOKED_AT
    low = f"{first:g} x or less" if least <= first else f"{least:.3g}"
    high = f"{last:g} x or more" if largest >= last else f"{largest:.3g} x"
    return (
        f"best at {human_count(best.ratio * student)}, {best.ratio:.3g} x the student; {low} to {high} come within "
        f"{NEAR} nats/token of that"
    )


def _at_hand(losses: dict[str, float], ratios: dict[str, float], alone: float) -> str:
    """Say which of the given teachers is best, and how its student's loss compares with training without a teacher."""
    chosen = min(losses, key=lambda name: losses[name])
    least = losses[chosen]
    as_good = [name for name, loss in losses.items() if loss <= least + NEAR and name != chosen]
    rest = f" (within {NEAR} nats/token: {', '.join(as_good)})" if as_good else ""
    side = "below" if least < alone else "above"
    best = "the best of those at hand is " if len(losses) > 1 else ""
    gain = f"{abs(alone - least):.3f} nats/token {side} training without a teacher"
    return f"{best}{chosen}, {ratios[chosen]:.2f} x{rest}, {gain}"


def _prediction(
    law: PublishedLaw,
    student: float,
    tokens: float,
    teachers: Sequence[GivenTeacher],
    best: float | None,
    summary: str,
    losses: dict[str, float] | None = None,
) -> Prediction:
    return Prediction(
        law=law.name,
        source=law.source,
        validity=law.validity,
        within_validity=law.covers(student, tokens, [teacher.size for teacher in teachers]),
        best_size=best,
        summary=summary,
        losses=losses or {},
    )
