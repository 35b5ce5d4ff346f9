"""Adds up figures over the rows of a recording, one block at a time.

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
    """Return 1, 2, 5, 10, 20, 50 and so on below `most`, and `most` itself."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return (*(step for step in steps if step < most), most)


def labelled(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return ids, probabilities, tail and labels of the rows of a batch that have a label.

    Ids and probabilities [N, K] are sorted by descending probability; probabilities and tail are float64.
    """
    assert batch.ids_NK is not None and batch.weights_NK is not None
    counted_N = batch.labels_BL.flatten() >= 0
    p_NK, order_NK = batch.weights_NK[counted_N].double().sort(dim=1, descending=True, stable=True)
    tail_N = None if batch.tail_N is None else batch.tail_N[counted_N].double().clamp_min(0)
    return batch.ids_NK[counted_N].gather(1, order_NK), p_NK, tail_N, batch.labels_BL.flatten()[counted_N]


class RowsAtTemperature:
    """Adds up kept probability, tails and entropies at one temperature.

    Args:
        temperature: The temperature, for the result.
        num_ids: Number of kept ids or samples in a row.
        vocab_size: Size of the real vocabulary.
    """

    def __init__(self, temperature: float, num_ids: int, vocab_size: int) -> None:
        self._temperature, self._vocab_size = temperature, vocab_size
        self._nums_Q = ladder(min(num_ids, vocab_size))
        self._mass_Q, self._kl_Q = np.zeros(len(self._nums_Q)), np.zeros(len(self._nums_Q))
        self._least, self._more, self._num_rows = 0.0, 0.0, 0
        self._tails: SpreadSums | None = None

    def add(self, p_NK: torch.Tensor, tail_N: torch.Tensor | None) -> None:
        """Add rows, with probabilities in descending order."""
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
        """Return the means over the rows so far, of which there must be at least one."""
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
    """Adds up how well the targets predict the real next tokens."""

    def __init__(self) -> None:
        self._calibration = CalibrationError(1)
        self._nats, self._kept, self._ids, self.num_rows = 0.0, 0, 0, 0

    def add(
        self, ids_NK: torch.Tensor, p_NK: torch.Tensor, labels_N: torch.Tensor, label_logprobs_N: Float64Array
    ) -> None:
        """Add rows, with ids and probabilities by descending probability."""
        self.num_rows += len(labels_N)
        self._nats -= float(label_logprobs_N.sum())
        self._kept += int(((ids_NK == labels_N[:, None]) & (p_NK > 0)).any(dim=1).sum())
        self._ids += int((p_NK > 0).sum())
        self._calibration.count(0, p_NK[:, 0], ids_NK[:, 0] == labels_N)

    def means(self) -> dict[str, Any]:
        """Return the means over the rows so far, by the names of the fields of `RecordingFidelity`."""
        nats = self._nats / self.num_rows
        return {
            "distinct_ids": self._ids / self.num_rows,
            # An unknown logprob is NaN, so a single one makes the mean unknown.
            "label_loss": None if math.isnan(nats) else nats,
            "label_kept": self._kept / self.num_rows,
            "ece": self._calibration.value(self.num_rows),
        }


class SamplingErrorSums:
    """Estimates, from samples alone, the error of their frequencies against the teacher's probabilities.

    Args:
        num_samples: Number of samples n in a row.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples, self._alike, self._bound, self._num_rows = num_samples, 0.0, 0.0, 0

    def add(self, p_NK: torch.Tensor) -> None:
        """Add rows of frequencies, which are counts over n."""
        n = self._num_samples
        counts_NK = (p_NK * n).round()
        self._num_rows += len(p_NK)
        # The expectation of a squared frequency is p^2 plus the id's part of the systematic error, which is small.
        self._alike += float(p_NK.square().sum())
        # The squared error of an id is f (1 - f) / n^2, where f is the fractional part of n p. If n p is below 1, this
        # is at most n p / n^2, and n p is the id's expected number of samples. Any other id adds at most 1/4 / n^2.
        once = float((counts_NK == 1).sum())
        self._bound += (once + 0.25 * float((counts_NK > 1).sum())) / n**2

    def result(self) -> tuple[SamplingError, ...]:
        """Return the errors by ascending number of samples; none if n is 1, since one sample does not show an error."""
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
    """Yield, for each n in `nums`, the squared errors of n independent and of n systematic samples, summed over rows.

    Args:
        p_NV: The full distributions, float64.
        nums: Numbers of samples.
    """
    alike = float(len(p_NV) - p_NV.square().sum())
    for num in nums:
        fraction_NV = (p_NV * num).frac()
        yield alike / num, float((fraction_NV * (1 - fraction_NV)).sum()) / num**2
