"""95 % intervals: the bootstrap over held-out sequences, and Student's t over seeds.

Legend: S sequences, R resamples.

A mean is a ratio of two sums, nats over labels, because sequences may differ in their number of labels. All models are
resampled with the same weights, so the interval of a difference is a paired one.
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
    """Draw how often each sequence occurs in each resample, int64 [R, S]; every row sums to S."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_sequences, np.full(num_sequences, 1.0 / num_sequences), size=num_resamples)


def bootstrap_interval(nats_S: Float64Array, labels_S: Int64Array, weights_RS: Int64Array) -> Interval:
    """Return the percentile interval of sum(nats) / sum(labels).

    Args:
        nats_S: Losses, or another quantity of labels, summed over each sequence's labels [S].
        labels_S: Number of labels of each sequence, at least one [S].
        weights_RS: Weights from :func:`resample_weights` [R, S].
    """
    return interval_of((weights_RS @ nats_S) / (weights_RS @ labels_S))


def interval_of(resampled_R: Float64Array) -> Interval:
    """Return the percentile interval of the values of the resamples [R]."""
    low, high = np.quantile(resampled_R, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Interval(low=float(low), high=float(high))


def t_interval(values: Sequence[float]) -> tuple[float, Interval]:
    """Return the mean of at least two independent values, and its interval by Student's t."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1) * math.sqrt(variance / len(values))
    return mean, Interval(low=mean - half, high=mean + half)


def t_quantile(degrees: int) -> float:
    """Return the t for which P(|T| < t) is `COVERAGE`, where T has Student's distribution with `degrees` >= 1.

    It is found by bisection on the angle atan(t / sqrt(degrees)), in which the probability rises from 0 to 1.
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
    """Return P(|T| < sqrt(degrees) tan(angle)), by Abramowitz and Stegun 26.7.3 and 26.7.4 for integer degrees."""
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
