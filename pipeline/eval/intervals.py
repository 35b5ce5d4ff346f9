"""95 % intervals: the bootstrap over held-out sequences, and Student's t over seeds.

Legend: S sequences, R resamples.

A mean is a ratio of sums, nats over labels, because sequences may hold unequally many labels. All models are resampled
with the same weights, so the interval of a difference is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from capgap.schemas.results import Interval

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

COVERAGE = 0.95


def resample_weights(num_sequences: int, num_resamples: int, seed: int = 0) -> Int64Array:
    """How often each sequence stands in each resample [R, S]; every row sums to S."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_sequences, np.full(num_sequences, 1.0 / num_sequences), size=num_resamples)


def bootstrap_interval(nats_S: Float64Array, labels_S: Int64Array, weights_RS: Int64Array) -> Interval:
    """Percentile interval of sum(nats) / sum(labels).

    Args:
        nats_S: losses, or anything else a label has, summed over each sequence's labels.
        labels_S: labels of each sequence, at least one.
        weights_RS: from :func:`resample_weights`.
    """
    return interval_of((weights_RS @ nats_S) / (weights_RS @ labels_S))


def interval_of(resampled_R: Float64Array) -> Interval:
    """Percentile interval of what each resample gave."""
    low, high = np.quantile(resampled_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(low=float(low), high=float(high))


def t_interval(values: Sequence[float]) -> tuple[float, Interval]:
    """Mean of at least two independent values, and its interval by Student's t."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return mean, Interval(low=mean - half, high=mean + half)


def t_quantile(degrees: int) -> float:
    """The t that a Student variable of `degrees` >= 1 degrees of freedom stays within with probability `COVERAGE`.

    Bisection on the angle atan(t / sqrt(degrees)), in which the probability rises from 0 to 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if _within(middle, degrees) < COVERAGE:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _within(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)), exact for whole degrees: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
