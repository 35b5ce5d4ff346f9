"""Separates noise from differences between teachers, with paired seeds.

Legend: M teachers, R seeds.

A loss is modelled as an effect of the teacher plus an effect of the seed plus a residual. The residuals, pooled over
all teachers, are the noise. Its variance has (M - 1)(R - 1) degrees of freedom, many more than a pair of teachers has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

LEVEL = 0.025
"""Probability that noise alone looks like a difference between one teacher and the best of all others (one-sided)."""

POWER = 0.8
"""Probability with which a difference of the size that :func:`smallest_difference` returns is shown."""

POWER_ERRORS = NormalDist().inv_cdf(POWER)
"""Number of standard errors by which a difference must exceed the threshold to be shown with probability `POWER`."""

MAX_SEEDS = 500
"""Largest number of seeds that :func:`seeds_needed` considers."""

_NUM_SIMULATED = 200_000


@dataclass(frozen=True)
class Contrasts:
    """The teachers' means of a curve, and its noise.

    Attributes:
        means_M: Mean loss over seeds with each teacher, nats/token.
        noise: Standard deviation of one run's residual, nats/token.
        degrees: Degrees of freedom of the noise, (M - 1)(R - 1).
        num_seeds: Number of seeds, R.
    """

    means_M: Array
    noise: float
    degrees: int
    num_seeds: int

    @property
    def standard_error(self) -> float:
        """Standard error of the difference between two teachers' means, nats/token."""
        return self.noise * math.sqrt(2 / self.num_seeds)

    @property
    def threshold(self) -> float:
        """Difference of one teacher to the best of all others above which it is more than noise, nats/token."""
        return self.standard_error * many_to_one(len(self.means_M) - 1, self.degrees)


def contrasts(losses_MR: Array) -> Contrasts:
    """Compute the means and the noise of a complete table with at least two teachers and two seeds."""
    num_teachers, num_seeds = losses_MR.shape
    rest_MR = losses_MR - losses_MR.mean(1, keepdims=True) - losses_MR.mean(0) + losses_MR.mean()
    degrees = (num_teachers - 1) * (num_seeds - 1)
    noise = math.sqrt(float(np.sum(rest_MR**2)) / degrees)
    return Contrasts(losses_MR.mean(1), noise, degrees, num_seeds)


def smallest_difference(noise: float, num_teachers: int, num_seeds: int) -> float:
    """Return the smallest difference to the best teacher that is shown with probability `POWER`, nats/token.

    It is the threshold plus `POWER_ERRORS` standard errors.
    """
    errors = many_to_one(num_teachers - 1, (num_teachers - 1) * (num_seeds - 1)) + POWER_ERRORS
    return noise * math.sqrt(2 / num_seeds) * errors


def seeds_needed(noise: float, num_teachers: int, difference: float) -> int | None:
    """Return the fewest seeds that show a difference (nats/token) with probability `POWER`; None above `MAX_SEEDS`."""
    low, high = 2, MAX_SEEDS
    if smallest_difference(noise, num_teachers, high) > difference:
        return None
    while low < high:
        middle = (low + high) // 2
        if smallest_difference(noise, num_teachers, middle) <= difference:
            high = middle
        else:
            low = middle + 1
    return low


@lru_cache(maxsize=128)
def many_to_one(num_others: int, degrees: int) -> float:
    """Return Dunnett's one-sided critical value (J. Am. Stat. Assoc. 50, 1955), in standard errors.

    The largest of several differences to one teacher exceeds it by noise alone with probability `LEVEL`. It is
    simulated from a fixed seed, and exact to about 0.02 for the degrees of freedom that occur.

    Args:
        num_others: Number of differences, M - 1.
        degrees: Degrees of freedom of the noise.
    """
    rng = np.random.default_rng(0)
    largest = np.full(_NUM_SIMULATED, -np.inf)
    for _ in range(num_others):
        np.maximum(largest, rng.standard_normal(_NUM_SIMULATED), out=largest)
    scale = np.sqrt(rng.chisquare(degrees, _NUM_SIMULATED) / degrees)
    differences = (largest - rng.standard_normal(_NUM_SIMULATED)) / (math.sqrt(2) * scale)
    return float(np.quantile(differences, 1 - LEVEL))
