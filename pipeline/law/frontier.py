"""Finds the settings that no other setting beats in compute and loss, under each accounting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capgap.pipeline.law.costs import STATED, flops, students_of_caches, unknown
from capgap.pipeline.law.grid import seeds_of
from capgap.pipeline.plan.costs import non_dominated
from capgap.schemas.law import LawRun
from capgap.schemas.law_frontier import Accounting, Frontier, FrontierPoint


def frontiers(runs: Sequence[LawRun]) -> tuple[Frontier, ...]:
    """Return one frontier for each accounting, over every setting of the grid, supervised ones included.

    A setting's loss is the mean over all seeds of its student. A setting that lacks a seed is left out and named.
    """
    return tuple(_frontier(runs, accounting) for accounting in STATED)


def _frontier(runs: Sequence[LawRun], accounting: Accounting) -> Frontier:
    num_students = students_of_caches(runs)
    teachers = {run.teacher.name: run.teacher for run in runs if run.teacher is not None}
    settings: dict[str, list[LawRun]] = {}
    for run in runs:
        if run.tokens == 0:
            continue  # an untrained student costs nothing, which has no place on a logarithmic axis
        settings.setdefault(_setting(run), []).append(run)
    found, left_out = [], []
    for name, group in settings.items():
        finished = {run.seed: run.loss for run in group if run.loss is not None}
        absent = [str(seed) for seed in seeds_of(runs, group[0].student.name) if seed not in finished]
        if absent:
            left_out.append(f"{name}: no result for seed {', '.join(absent)}")
            continue
        if lacking := unknown(group[0], accounting, teachers):
            left_out.append(f"{name}: {lacking}")
            continue
        cost = flops(group[0], accounting, num_students, teachers)
        mean = math.fsum(finished.values()) / len(finished)
        point = FrontierPoint(
            name=name,
            flops=cost,
            loss=mean,
            num_seeds=len(finished),
            supervised=group[0].teacher is None,
            on_frontier=False,
        )
        found.append(point)
    found.sort(key=lambda point: (point.flops, point.loss))
    best = non_dominated([point.flops for point in found], [point.loss for point in found])
    return Frontier(
        accounting=accounting,
        stated=STATED[accounting],
        points=tuple(
            point.model_copy(update={"on_frontier": is_best}) for point, is_best in zip(found, best, strict=True)
        ),
        left_out=tuple(left_out),
    )


def _setting(run: LawRun) -> str:
    """Return the run's name without its seed."""
    return run.name.rpartition(", seed ")[0]
