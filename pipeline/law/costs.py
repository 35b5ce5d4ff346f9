"""Counts the floating-point operations that a run of a grid costs, under three accountings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from capgap.pipeline.plan.costs import scoring_flops, training_flops
from capgap.schemas.law import LawRun, LawTeacher
from capgap.schemas.law_frontier import Accounting

STATED: Mapping[Accounting, str] = {
    "paper": "6 N_S D + 2 N_T D_C: the student's training, and the teacher's pass over the cached tokens paid by each "
    "student alone. As in the law of capacity gap's paper; the teacher's own training is not counted.",
    "shared": "6 N_S D + 2 N_T D_C / students: the cache is made once and shared by all students of the grid that read "
    "it. Seeds do not count as students. The teacher's own training is not counted.",
    "everything": "6 N_S D + 2 N_T D_C + 6 N_T D_T: as if teacher and cache were made for this student alone, the "
    "teacher's training counted. A student pruned from a teacher pays that teacher's training too.",
}


def students_of_caches(runs: Sequence[LawRun]) -> dict[str, int]:
    """Count the students with a result that have read each cache, by the cache's identity."""
    readers: dict[str, set[str]] = {}
    for run in runs:
        if run.cache is not None and run.loss is not None:
            readers.setdefault(run.cache.identity, set()).add(run.student.name)
    return {identity: len(students) for identity, students in readers.items()}


def unknown(run: LawRun, accounting: Accounting, teachers: Mapping[str, LawTeacher]) -> str | None:
    """Return a sentence on what the accounting needs and the table lacks; None where it lacks nothing."""
    if accounting == "everything":
        for name in _trained(run):
            if name not in teachers or teachers[name].train_tokens is None:
                return f"the table does not say on how many tokens {name} was trained"
    return None


def flops(
    run: LawRun, accounting: Accounting, num_students: Mapping[str, int], teachers: Mapping[str, LawTeacher]
) -> float:
    """Return the cost of a run with a result, in floating-point operations.

    Args:
        run: The run; :func:`unknown` must be None for it.
        accounting: The accounting.
        num_students: Number of students of each cache, from :func:`students_of_caches`.
        teachers: The grid's teachers, by name.
    """
    cost = training_flops(run.student.num_parameters, run.tokens)
    if run.cache is not None and run.teacher is not None:
        scoring = scoring_flops(run.teacher.num_parameters, run.cache.num_tokens)
        cost += scoring / num_students[run.cache.identity] if accounting == "shared" else scoring
    if accounting == "everything":
        for name in _trained(run):
            tokens = teachers[name].train_tokens
            assert tokens is not None
            cost += training_flops(teachers[name].num_parameters, tokens)
    return cost


def _trained(run: LawRun) -> list[str]:
    """Return the names of the teachers that the run learned from or was pruned from."""
    names = (run.init_source, run.teacher.name if run.teacher else None)
    return sorted({name for name in names if name is not None})
