"""Computes the mean and quantiles of a quantity between 0 and 1 by a histogram, so that no values are kept.

Legend: N rows, B bins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from capgap.schemas.fidelity import Spread

# A hundred bins for each decade. A quantile is given as the upper edge of its bin, which is at most 2.4 % too high.
_EDGES_B = np.concatenate([[0.0], np.logspace(-9, 0, 901)])


class SpreadSums:
    """Adds up the values of rows; for the quantiles, a value below 1e-9 counts as 0."""

    def __init__(self) -> None:
        self._sum, self._counts_B = 0.0, np.zeros(len(_EDGES_B), np.int64)

    def add(self, values_N: npt.NDArray[np.float64]) -> None:
        """Add the values of rows, float64."""
        self._sum += float(values_N.sum())
        bins_N = np.searchsorted(_EDGES_B, np.where(values_N < _EDGES_B[1], 0.0, values_N))
        self._counts_B += np.bincount(np.minimum(bins_N, len(_EDGES_B) - 1), minlength=len(_EDGES_B))

    def result(self) -> Spread:
        """Return the mean and quantiles of the rows so far, of which there must be at least one."""
        ends_B = np.cumsum(self._counts_B)
        median, p95, p99 = (float(_EDGES_B[np.searchsorted(ends_B, q * ends_B[-1])]) for q in (0.5, 0.95, 0.99))
        return Spread(mean=self._sum / int(ends_B[-1]), median=median, p95=p95, p99=p99)
