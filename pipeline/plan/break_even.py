"""From how many students a cache costs less than a teacher that runs beside each of them.

    online   n (S + T)     n trainings, each with a forward pass of the teacher for every token, in every epoch
    cached   C + n S       one pass of the teacher over the cached tokens, and n trainings that read the cache

A cache costs less where C < n T. With operations counted as the paper does (6 N_S D for a training and 2 N_T D for the
teacher's forward pass; arXiv 2311.07052), C = 2 N_T D_cache and T = 2 N_T D_student: if each student trains one epoch
over the whole cache, the cache pays from the second student on. This accounting counts neither the reading of a cache
nor the memory that an online teacher takes beside its student.
"""

from __future__ import annotations

import math

from capgap.pipeline.plan.work import RunWork
from capgap.schemas.plan import BreakEven, Figure


def least_students(once: float, each: float) -> int | None:
    """Return the least integer n with `once` < n x `each`; None where `each` is zero."""
    return math.floor(once / each) + 1 if each > 0 else None


def break_even(work: RunWork, cache_rate: Figure, online_rate: float | None) -> tuple[BreakEven, ...]:
    """Return from how many students a cache pays, counted in operations and in seconds of the teacher's device.

    Args:
        work: What the run has to do.
        cache_rate: Tokens/s of one engine of the cache stage.
        online_rate: Tokens/s of a teacher that only scores, beside a student that trains; None for the rate of the
            cache stage.
    """
    return _in_operations(work), _in_seconds(work, cache_rate, online_rate)


def _in_operations(work: RunWork) -> BreakEven:
    accounting = "operations: 6 N_S D + 2 N_T D online, 2 N_T D once for a cache"
    cached, student = work.cache_tokens.value, work.most_student_tokens.value
    if cached is None or student is None:
        return BreakEven(accounting=accounting, num_students=None, source="needs the numbers of tokens")
    n = least_students(cached, student)
    return BreakEven(
        accounting=accounting,
        num_students=n,
        source=f"{cached:,.0f} tokens cached, {student:,.0f} tokens a student",
    )


def _in_seconds(work: RunWork, cache_rate: Figure, online_rate: float | None) -> BreakEven:
    accounting = "seconds of the teacher's device"
    cached, student = work.cache_tokens.value, work.most_student_tokens.value
    if cached is None or student is None or cache_rate.value is None:
        missing = "the numbers of tokens" if cache_rate.value is not None else "the rate of the cache stage"
        return BreakEven(accounting=accounting, num_students=None, source=f"needs {missing}")
    online = cache_rate.value if online_rate is None else online_rate
    how = "taken to be the same beside a student; --online-teacher-tokens-per-s gives another"
    return BreakEven(
        accounting=accounting,
        num_students=least_students(cached / cache_rate.value, student / online),
        source=f"caching at {cache_rate.value:,.0f} tokens/s ({cache_rate.source}), "
        + (how if online_rate is None else f"beside a student {online:,.0f} tokens/s (stated)"),
    )
