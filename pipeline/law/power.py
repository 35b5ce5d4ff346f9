"""The smallest difference between two teachers that a grid will show, and the seeds that a wished one takes.

The noise is a pilot's: the runs of a smaller grid, or the finished seeds of this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from capgap.pipeline.law.contrasts import contrasts, seeds_needed, smallest_difference
from capgap.pipeline.law.grid import TeacherCurve
from capgap.pipeline.law.sizes import Sizes
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import StudentPower

_CAUTIOUS = 0.9  # probability with which the noise lies below its upper limit


def upper_limit(noise: float, degrees: int) -> float:
    """What the true noise lies below with probability 0.9, by a pilot's noise of so many degrees of freedom.

    Its square is a chi-squared variable's, whose quantile is that of Wilson and Hilferty (PNAS 17, 1931).
    """
    spread = 2 / (9 * degrees)
    quantile = degrees * max(1 - spread - NormalDist().inv_cdf(_CAUTIOUS) * math.sqrt(spread), 0.01) ** 3
    return noise * math.sqrt(degrees / quantile)


def powers(grid: LawGrid, sizes: Sizes, pilot: Sequence[TeacherCurve], difference: float) -> tuple[StudentPower, ...]:
    """What each student of the grid will show, by the pilot's student that is nearest to it in size.

    Args:
        grid: the grid.
        sizes: of its models.
        pilot: curves of the pilot; those with fewer than two seeds or teachers say nothing.
        difference: nats/token that one would like to see.
    """
    usable = [curve for curve in pilot if len(curve.seeds) > 1 and len(curve.teachers) > 1]
    if not usable:
        return ()
    return tuple(_power(grid, name, one.num_parameters, usable, difference) for name, one in sizes.students.items())


def _power(grid: LawGrid, student: str, size: int, pilot: Sequence[TeacherCurve], difference: float) -> StudentPower:
    distances = [abs(math.log(curve.student.num_parameters / size)) for curve in pilot]
    nearest = [curve for curve, far in zip(pilot, distances, strict=True) if far == min(distances)]
    # of several budgets and alphas the noisiest: a grid should show the difference in each of them
    found, curve = max(((contrasts(one.losses_MR), one) for one in nearest), key=lambda pair: pair[0].noise)
    num_teachers, num_seeds = len(grid.teachers), len(grid.seeds)
    high = upper_limit(found.noise, found.degrees)
    enough = num_teachers > 1 and num_seeds > 1
    return StudentPower(
        student=student,
        pilot=f"{curve.student.name}, {curve.budget}, alpha {curve.alpha:g}",
        size_ratio=size / curve.student.num_parameters,
        noise=found.noise,
        noise_limit=high,
        smallest=smallest_difference(found.noise, num_teachers, num_seeds) if enough else None,
        smallest_cautious=smallest_difference(high, num_teachers, num_seeds) if enough else None,
        wished=difference,
        seeds_needed=seeds_needed(found.noise, num_teachers, difference) if num_teachers > 1 else None,
        seeds_needed_cautious=seeds_needed(high, num_teachers, difference) if num_teachers > 1 else None,
    )
