"""The published laws, asked about the teacher and the student of a run."""

from __future__ import annotations

from capgap.pipeline.plan.published import (
    CAPACITY_GAP,
    CHINCHILLA_TOKENS_PER_PARAMETER,
    DISTILLATION_SCALING,
    GAP_INTERCEPT,
    GAP_SLOPE,
    NEAR,
    distilled_loss,
    gap_best_teacher,
    supervised_loss,
)
from capgap.pipeline.plan.work import RunWork
from capgap.schemas.plan import PublishedLaw

_MINIMA = "Zhang et al., ACL 2025 (arXiv 2311.07052)"
_BUSBRIDGE = "Busbridge et al., ICML 2025 (arXiv 2502.08606)"


def published_laws(work: RunWork) -> tuple[PublishedLaw, ...]:
    """What each says; they disagree, and neither is of this text and these models."""
    return _minima(work), _busbridge(work)


def _minima(work: RunWork) -> PublishedLaw:
    student, teacher = work.student.total, work.teacher.total
    rule = f"best teacher = {GAP_SLOPE:g} x student - {-GAP_INTERCEPT / 1e6:.1f}M parameters"
    of = "of students below 3B, pruned from their own teacher"
    best = None if student is None else gap_best_teacher(student)
    if student is None or best is None:
        why = "the student's size is not known" if student is None else "it names no teacher for a student so small"
        return _silent(_MINIMA, f"{rule}, {of}; {why}")
    chosen = "" if teacher is None else f"; chosen: {teacher / student:.2f} x"
    outside = "" if student <= CAPACITY_GAP.max_student else f"; a student of {_size(student)} is outside its range"
    return PublishedLaw(
        name=_MINIMA,
        best_ratio=best / student,
        best_teacher_parameters=best,
        says=f"{rule}, {of}: {_size(best)}, {best / student:.2f} x the student{chosen}{outside}",
    )


def _busbridge(work: RunWork) -> PublishedLaw:
    student, teacher, tokens = work.student.outside_embedding, work.teacher.outside_embedding, work.student_tokens.value
    rule = "the teacher's loss decides, not its size"
    if student is None or not tokens:
        return _silent(_BUSBRIDGE, f"{rule}; needs the student's size and its tokens")
    law = DISTILLATION_SCALING
    if not law.min_student <= student <= law.max_student or tokens > (law.max_tokens or 0):
        return _silent(_BUSBRIDGE, f"{rule}; this student is outside its range, 143M to 12.6B parameters, 512B tokens")
    ratio, least, largest = best_ratio(student, tokens)
    chosen = "" if teacher is None else f"; chosen: {teacher / student:.2f} x"
    return PublishedLaw(
        name=_BUSBRIDGE,
        best_ratio=ratio,
        best_teacher_parameters=ratio * student,
        says=f"{rule}; for {tokens / student:.3g} tokens a parameter and teachers that saw 20, {ratio:.3g} x the "
        f"student, {_size(ratio * student)}; {least:.3g} to {largest:.3g} x come within 0.005 nats; without "
        f"embeddings{chosen}; some coefficients are from secondary sources",
    )


def best_ratio(
    num_student_parameters: float,
    num_tokens: float,
    teacher_tokens_per_parameter: float = CHINCHILLA_TOKENS_PER_PARAMETER,
) -> tuple[float, float, float]:
    """Teacher over student where `distilled_loss` is lowest, and the least and the largest ratio nearly as good.

    Ratios from 0.25 to 256 are looked at, and nearly is within `NEAR` nats. The teacher has seen so many tokens a
    parameter.
    """

    def loss(ratio: float) -> float:
        size = ratio * num_student_parameters
        teacher_loss = supervised_loss(size, teacher_tokens_per_parameter * size)
        return distilled_loss(num_student_parameters, num_tokens, teacher_loss)

    ratios = [2 ** (step / 16) for step in range(-32, 129)]
    losses = list(map(loss, ratios))
    lowest = min(losses)
    near = [ratio for ratio, value in zip(ratios, losses, strict=True) if value <= lowest + NEAR]
    return ratios[losses.index(lowest)], near[0], near[-1]


def _silent(name: str, says: str) -> PublishedLaw:
    return PublishedLaw(name=name, best_ratio=None, best_teacher_parameters=None, says=says)


def _size(num_parameters: float) -> str:
    return f"{num_parameters / 1e9:.2f}B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.1f}M"
