"""Sums over rows of a recording, block after block.

Legend: N rows (labelled positions), K ids of the widest row, Q numbers of ids, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from capgap.pipeline.eval.calibration import CalibrationError
from capgap.pipeline.fidelity.spread import SpreadSums
from capgap.pipeline.store import Batch
from capgap.schemas.fidelity import AtTemperature, KeptMass, SamplingError

Float64Array = npt.NDArray[np.float64]


def ladder(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 and so on below `most`, and `most` itself."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return (*(step for step in steps if step < most), most)


def labelled(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Ids, probabilities in float64 by falling size, tail and labels of a batch's rows that have one."""
    assert batch.ids_NK is not None and batch.weights_NK is not None
    counted_N = batch.labels_BL.flatten() >= 0
    p_NK, order_NK = batch.weights_NK[counted_N].double().sort(dim=1, descending=True, stable=True)
    tail_N = None if batch.tail_N is None else batch.tail_N[counted_N].double().clamp_min(0)
    return batch.ids_NK[counted_N].gather(1, order_NK), p_NK, tail_N, batch.labels_BL.flatten()[counted_N]


class RowsAtTemperature:
    """Masses, tails and entropies at one temperature.

    Args:
        temperature: stands in the result.
        num_ids: kept ids or samples a row.
        vocab_size: real ids.
    """

    def __init__(self, temperature: float, num_ids: int, vocab_size: int) -> None:
        self._temperature, self._vocab_size = temperature, vocab_size
        self._nums_Q = ladder(min(num_ids, vocab_size))
        self._mass_Q, self._kl_Q = np.zeros(len(self._nums_Q)), np.zeros(len(self._nums_Q))
        self._least, self._more, self._num_rows = 0.0, 0.0, 0
        self._tails: SpreadSums | None = None

    def add(self, p_NK: torch.Tensor, tail_N: torch.Tensor | None) -> None:
        """Count further rows, probabilities falling."""
        self._num_rows += len(p_NK)
        mass_NK = p_NK.cumsum(dim=1)
        for place, num in enumerate(self._nums_Q):
            mass_N = mass_NK[:, min(num, mass_NK.shape[1]) - 1]
            self._mass_Q[place] += float(mass_N.sum())
            self._kl_Q[place] -= float(mass_N.clamp(max=1.0).log().sum())
        self._least += float(torch.special.entr(p_NK).sum())
        if tail_N is None:
            return
        self._tails = self._tails or SpreadSums()
        self._tails.add(tail_N.numpy())
        self._least += float(torch.special.entr(tail_N).sum())
        others_N = (self._vocab_size - (p_NK > 0).sum(dim=1)).clamp_min(1).double()
        self._more += float((tail_N * others_N.log()).sum())

    def result(self) -> AtTemperature:
        """Means over the rows so far, of which there is one at least."""
        is_sampled = self._tails is None
        kept = tuple(
            KeptMass(
                num_ids=num,
                mass=float(self._mass_Q[place] / self._num_rows),
                truncation_kl=None if is_sampled else max(float(self._kl_Q[place] / self._num_rows), 0.0),
            )
            for place, num in enumerate(self._nums_Q)
        )
        least = self._least / self._num_rows
        return AtTemperature(
            temperature=self._temperature,
            kept=kept,
            tail=None if self._tails is None else self._tails.result(),
            least_entropy=least,
            most_entropy=None if is_sampled else least + self._more / self._num_rows,
        )


class LabelSums:
    """How the targets fare against the real next tokens."""

    def __init__(self) -> None:
        self._calibration = CalibrationError(1)
        self._nats, self._kept, self._ids, self.num_rows = 0.0, 0, 0, 0

    def add(
        self, ids_NK: torch.Tensor, p_NK: torch.Tensor, labels_N: torch.Tensor, label_logprobs_N: Float64Array
    ) -> None:
        """Count further rows, probabilities falling."""
        self.num_rows += len(labels_N)
        self._nats -= float(label_logprobs_N.sum())
        self._kept += int(((ids_NK == labels_N[:, None]) & (p_NK > 0)).any(dim=1).sum())
        self._ids += int((p_NK > 0).sum())
        self._calibration.count(0, p_NK[:, 0], ids_NK[:, 0] == labels_N)

    def means(self) -> dict[str, Any]:
        """Fields of `RecordingFidelity`."""
        nats = self._nats / self.num_rows
        return {
            "distinct_ids": self._ids / self.num_rows,
            # one unknown logprob makes the sum unknown
            "label_loss": None if math.isnan(nats) else nats,
            "label_kept": self._kept / self.num_rows,
            "ece": self._calibration.value(self.num_rows),
        }


class SamplingErrorSums:
    """How far the frequencies of n samples are from the teacher's probabilities, from the samples alone.

    Args:
        num_samples: n.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples, self._alike, self._bound, self._num_rows = num_samples, 0.0, 0.0, 0

    def add(self, p_NK: torch.Tensor) -> None:
        """Count further rows of frequencies."""
        n = self._num_samples
        counts_NK = (p_NK * n).round()
        self._num_rows += len(p_NK)
        # the mean of a squared frequency is p^2 and that id's part of the systematic error, which is small
        self._alike += float(p_NK.square().sum())
        # of an id with n p below 1, f is n p, whose mean is that of its samples; any other adds a quarter at most
        once = float((counts_NK == 1).sum())
        self._bound += (once + 0.25 * float((counts_NK > 1).sum())) / n**2

    def result(self) -> tuple[SamplingError, ...]:
        """Errors by rising number of samples; none for a single sample, which has no spread."""
        if self._num_samples == 1:
            return ()
        alike = self._alike / self._num_rows
        return tuple(
            SamplingError(
                num_samples=num,
                independent=(1 - alike) / num,
                systematic=self._bound / self._num_rows if num == self._num_samples else None,
            )
            for num in ladder(self._num_samples)
        )


def exact_sampling_errors(p_NV: torch.Tensor, nums: tuple[int, ...]) -> Iterator[tuple[float, float]]:
    """Squared errors of n independent and of n systematic samples of full distributions, summed over rows."""
    alike = float(len(p_NV) - p_NV.square().sum())
    for num in nums:
        fraction_NV = (p_NV * num).frac()
        yield alike / num, float((fraction_NV * (1 - fraction_NV)).sum()) / num**2
