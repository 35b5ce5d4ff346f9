"""What is noise and what is a difference between teachers, once seeds are paired.

Legend: M teachers, R seeds.

A loss is taken as teacher + seed + rest. The rest, pooled over all teachers, is the noise; its variance has
(M - 1)(R - 1) degrees of freedom, which is far more than any pair of teachers has alone.
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
"""Probability, at one end, that noise alone passes for a difference from any of the other teachers."""

POWER = 0.8
"""Probability with which a difference of the stated size is shown."""

POWER_ERRORS = NormalDist().inv_cdf(POWER)
"""By how many standard errors such a difference is larger than the threshold."""

MAX_SEEDS = 500
"""Beyond that nobody is told a number."""

_NUM_SIMULATED = 200_000


@dataclass(frozen=True)
class Contrasts:
    """The noise of a curve.

    Attributes:
        means_M: means over seeds, nats/token.
        noise: standard deviation of what is left of one run, nats.
        degrees: of freedom, (M - 1)(R - 1).
        num_seeds: R.
    """

    means_M: Array
    noise: float
    degrees: int
    num_seeds: int

    @property
    def standard_error(self) -> float:
        """Standard error of the difference of two teachers' means."""
        return self.noise * math.sqrt(2 / self.num_seeds)

    @property
    def threshold(self) -> float:
        """Differences above this, from one teacher to the best of all others, are more than noise."""
        return self.standard_error * many_to_one(len(self.means_M) - 1, self.degrees)


def contrasts(losses_MR: Array) -> Contrasts:
    """The noise of a complete table of at least two teachers and two seeds."""
    num_teachers, num_seeds = losses_MR.shape
    rest_MR = losses_MR - losses_MR.mean(1, keepdims=True) - losses_MR.mean(0) + losses_MR.mean()
    degrees = (num_teachers - 1) * (num_seeds - 1)
    noise = math.sqrt(float(np.sum(rest_MR**2)) / degrees)
    return Contrasts(losses_MR.mean(1), noise, degrees, num_seeds)


def smallest_difference(noise: float, num_teachers: int, num_seeds: int) -> float:
    """Nats/token by which a teacher must be worse than the best to be shown so with probability `POWER`.

    That is the threshold and `POWER_ERRORS` more.
    """
    errors = many_to_one(num_teachers - 1, (num_teachers - 1) * (num_seeds - 1)) + POWER_ERRORS
    return noise * math.sqrt(2 / num_seeds) * errors


def seeds_needed(noise: float, num_teachers: int, difference: float) -> int | None:
    """Fewest seeds with which this difference is shown with probability `POWER`; None beyond `MAX_SEEDS`."""
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
    """Largest of `num_others` differences from one teacher, in standard errors, that noise exceeds with `LEVEL`.

    Dunnett's one-sided critical value (J. Am. Stat. Assoc. 50, 1955), by simulation from a fixed seed: exact to about
    0.02 for the degrees of freedom that occur.
    """
    rng = np.random.default_rng(0)
    largest = np.full(_NUM_SIMULATED, -np.inf)
    for _ in range(num_others):
        np.maximum(largest, rng.standard_normal(_NUM_SIMULATED), out=largest)
    scale = np.sqrt(rng.chisquare(degrees, _NUM_SIMULATED) / degrees)
    differences = (largest - rng.standard_normal(_NUM_SIMULATED)) / (math.sqrt(2) * scale)
    return float(np.quantile(differences, 1 - LEVEL))
