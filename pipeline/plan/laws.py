"""The published laws, asked about the teacher and the student of a run."""

from __future__ import annotations

from capgap.pipeline.plan.published import (
    BUSBRIDGE_SIZES,
    BUSBRIDGE_TOKENS,
    MINIMA_INTERCEPT,
    MINIMA_LARGEST_STUDENT,
    MINIMA_SLOPE,
    best_ratio,
    minima_teacher,
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
    rule = f"best teacher = {MINIMA_SLOPE:g} x student - {-MINIMA_INTERCEPT / 1e6:.1f}M parameters"
    of = "of students below 3B, pruned from their own teacher"
    if student is None or minima_teacher(student) <= 0:
        why = "the student's size is not known" if student is None else "it names no teacher for a student so small"
        return _silent(_MINIMA, f"{rule}, {of}; {why}")
    best = minima_teacher(student)
    chosen = "" if teacher is None else f"; chosen: {teacher / student:.2f} x"
    outside = "" if student < MINIMA_LARGEST_STUDENT else f"; a student of {_size(student)} is outside its range"
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
    smallest, largest_size = BUSBRIDGE_SIZES
    if not smallest <= student <= largest_size or tokens > BUSBRIDGE_TOKENS:
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


def _silent(name: str, says: str) -> PublishedLaw:
    return PublishedLaw(name=name, best_ratio=None, best_teacher_parameters=None, says=says)


def _size(num_parameters: float) -> str:
    return f"{num_parameters / 1e9:.2f}B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.1f}M"
