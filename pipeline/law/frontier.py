"""Compute against quality: the settings that no other setting beats, under each accounting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from capgap.pipeline.law.costs import STATED, flops, students_of_caches, unknown
from capgap.schemas.law import LawRun
from capgap.schemas.law_fit import Accounting, Frontier, FrontierPoint


def frontiers(runs: Sequence[LawRun]) -> tuple[Frontier, ...]:
    """One for each accounting, over every setting of the grid, the supervised ones included.

    A setting's loss is the mean over all seeds of the table. One that misses a seed is left out and named.
    """
    return tuple(_frontier(runs, accounting) for accounting in STATED)


def non_dominated(costs: Sequence[float], losses: Sequence[float]) -> tuple[bool, ...]:
    """Of each point, whether no other is at most as costly and at most as bad, and better in one of both."""
    points = list(zip(costs, losses, strict=True))
    return tuple(
        not any(c <= cost and loss <= own and (c, loss) != (cost, own) for c, loss in points) for cost, own in points
    )


def _frontier(runs: Sequence[LawRun], accounting: Accounting) -> Frontier:
    seeds = tuple(sorted({run.seed for run in runs}))
    num_students = students_of_caches(runs)
    teachers = {run.teacher.name: run.teacher for run in runs if run.teacher is not None}
    settings: dict[str, list[LawRun]] = {}
    for run in runs:
        settings.setdefault(_setting(run), []).append(run)
    found, left_out = [], []
    for name, group in settings.items():
        finished = {run.seed: run.loss for run in group if run.loss is not None}
        absent = [str(seed) for seed in seeds if seed not in finished]
        if absent:
            left_out.append(f"{name}: no result for seed {', '.join(absent)}")
            continue
        if lacking := unknown(group[0], accounting, teachers):
            left_out.append(f"{name}: {lacking}")
            continue
        cost = flops(group[0], accounting, num_students, teachers)
        mean = math.fsum(finished.values()) / len(finished)
        found.append((cost, mean, name, group[0].teacher is None))
    found.sort()
    best = non_dominated([point[0] for point in found], [point[1] for point in found])
    return Frontier(
        accounting=accounting,
        stated=STATED[accounting],
        seeds=seeds,
        points=tuple(
            FrontierPoint(name=name, flops=cost, loss=loss, supervised=supervised, on_frontier=on)
            for (cost, loss, name, supervised), on in zip(found, best, strict=True)
        ),
        left_out=tuple(left_out),
    )


def _setting(run: LawRun) -> str:
    """The run's name without its seed."""
    return run.name.rpartition(", seed ")[0]
