"""Estimates the smallest difference between teachers that a grid will show, and the seeds that a given one needs.

The noise is taken from a pilot: the runs of a smaller grid, or the finished seeds of the grid itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from capgap.pipeline.law.contrasts import contrasts, seeds_needed, smallest_difference
from capgap.pipeline.law.grid import TeacherCurve
from capgap.pipeline.law.sizes import Sizes
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import StudentPower

_CAUTIOUS = 0.9  # probability that the noise is below its upper limit
_NUM_HALVINGS = 60  # halvings of an interval, enough for the last digit of a double


def upper_limit(noise: float, degrees: int) -> float:
    """Return the value that the true noise is below with probability 0.9.

    The square of a pilot's noise is distributed like the square of the true noise times a chi-squared variable divided
    by its degrees of freedom.

    Args:
        noise: Noise of the pilot, nats/token.
        degrees: Degrees of freedom of the pilot's noise.
    """
    low, high = 0.0, float(degrees)  # the quantile is below the mean, which equals the degrees
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _chi_squared_above(middle, degrees) > _CAUTIOUS else (low, middle)
    return noise * math.sqrt(degrees / high)


def _chi_squared_above(value: float, degrees: int) -> float:
    """Return the probability that a chi-squared variable exceeds a positive value.

    For a whole number of degrees of freedom it is a finite sum.
    """
    half, odd = value / 2, degrees % 2
    first = math.erfc(math.sqrt(half)) if odd else 0.0
    powers_of_half = (number + odd / 2 for number in range(degrees // 2))
    return first + math.fsum(math.exp(p * math.log(half) - half - math.lgamma(p + 1)) for p in powers_of_half)


def powers(grid: LawGrid, sizes: Sizes, pilot: Sequence[TeacherCurve], difference: float) -> tuple[StudentPower, ...]:
    """Estimate which differences each student of the grid will show, by the pilot's student nearest to it in size.

    Args:
        grid: The grid.
        sizes: Sizes of the grid's models.
        pilot: Curves of the pilot; those with fewer than two seeds or teachers are not used.
        difference: Difference between two teachers that the grid should show, nats/token.
    """
    usable = [curve for curve in pilot if len(curve.seeds) > 1 and len(curve.teachers) > 1]
    if not usable:
        return ()
    return tuple(_power(grid, name, one.num_parameters, usable, difference) for name, one in sizes.students.items())


def _power(grid: LawGrid, student: str, size: int, pilot: Sequence[TeacherCurve], difference: float) -> StudentPower:
    distances = [abs(math.log(curve.student.num_parameters / size)) for curve in pilot]
    nearest = [curve for curve, far in zip(pilot, distances, strict=True) if far == min(distances)]
    # the noisiest of several budgets and alphas, so that the grid shows the difference in each of them
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
