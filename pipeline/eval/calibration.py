"""Expected calibration error: how far a model's confidence in its top-1 token is from how often that token is right.

Legend: S sequences, N rows (labelled positions), V real vocabulary, B bins, R resamples.

Bin m of 15 holds the rows at which the top-1 token has a probability in ((m - 1) / 15, m / 15]. Over bins of n_m of N
rows, ECE is the sum of n_m / N x |share of rows at which that token is the label - mean probability|: Guo et al., "On
Calibration of Modern Neural Networks", 2017 (arXiv 1706.04599), equation 3. As a mean of absolute values it is above
0 even for a calibrated model, and the more so the fewer rows there are. The same holds for its resamples and interval.
"""

from __future__ import annotations

import numpy as np
import torch

from capgap.pipeline.eval.intervals import Float64Array, Int64Array, interval_of
from capgap.schemas.results import Interval, ReliabilityBin

NUM_BINS = 15


class CalibrationError:
    """Collects the calibration of one model, when it is given to :func:`capgap.pipeline.eval.measure.score`.

    Args:
        num_sequences: Number of sequences S.

    Attributes:
        excess_SB: Probability of the top-1 token, minus 1 where that token is the label, summed over the rows of each
            sequence that fall into each bin [S, B], float64.
        counts_SB: Number of rows of each sequence in each bin [S, B], int64.
        confidence_SB: Probability of the top-1 token, summed over the same rows [S, B], float64.
    """

    def __init__(self, num_sequences: int) -> None:
        self.excess_SB: Float64Array = np.zeros((num_sequences, NUM_BINS))
        self.counts_SB: Int64Array = np.zeros((num_sequences, NUM_BINS), np.int64)
        self.confidence_SB: Float64Array = np.zeros((num_sequences, NUM_BINS))

    def part(self, start: int, stop: int) -> CalibrationError:
        """Return a view of the sequences `start` to `stop`, counted from 0; what is added to it is added here too."""
        part = CalibrationError(0)
        part.excess_SB = self.excess_SB[start:stop]
        part.counts_SB, part.confidence_SB = self.counts_SB[start:stop], self.confidence_SB[start:stop]
        return part

    def add(self, sequence: int, logprobs_NV: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Count further rows of a sequence, given as float32 logprobs at temperature 1 and int64 labels."""
        top_N, ids_N = logprobs_NV.max(-1)
        self.count(sequence, top_N.double().exp(), ids_N == labels_N)

    def count(self, sequence: int, confidence_N: torch.Tensor, right_N: torch.Tensor) -> None:
        """Count further rows of a sequence: float64 probabilities of the top-1 tokens, and whether these are right."""
        bins_N = (confidence_N * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        on_host_N, sure_N = bins_N.cpu(), confidence_N.cpu()
        self.excess_SB[sequence] += np.bincount(on_host_N, sure_N - right_N.double().cpu(), NUM_BINS)
        self.counts_SB[sequence] += np.bincount(on_host_N, minlength=NUM_BINS)
        self.confidence_SB[sequence] += np.bincount(on_host_N, sure_N, NUM_BINS)

    def error(self, labels_S: Int64Array, weights_RS: Int64Array) -> tuple[float, Interval]:
        """Return the expected calibration error, and its bootstrap interval over sequences."""
        found = self.value(int(labels_S.sum()))
        resampled_R = np.abs(weights_RS @ self.excess_SB).sum(axis=1) / (weights_RS @ labels_S)
        return found, interval_of(resampled_R)

    def reliability(self) -> tuple[ReliabilityBin, ...]:
        """Return the bins that hold at least one row."""
        counts_B, sure_B, excess_B = (sums.sum(0) for sums in (self.counts_SB, self.confidence_SB, self.excess_SB))
        return tuple(
            ReliabilityBin(num_tokens=int(count), confidence=float(sure / count), right=float((sure - excess) / count))
            for count, sure, excess in zip(counts_B, sure_B, excess_B, strict=True)
            if count
        )

    def value(self, num_rows: int) -> float:
        """Return the expected calibration error without an interval; `num_rows` is the number of counted rows."""
        return float(np.abs(self.excess_SB.sum(axis=0)).sum() / num_rows)
