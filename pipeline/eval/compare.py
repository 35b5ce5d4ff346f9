"""A student's distributions against the teacher's full ones.

Legend: N rows (labelled positions), S sequences, R resamples, V real vocabulary, K top tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from capgap.pipeline.eval.intervals import Float64Array, Int64Array, bootstrap_interval
from capgap.pipeline.eval.spool import Spool
from capgap.schemas.errors import InputError
from capgap.schemas.results import AgainstTeacher

_NUM_TOP = 5


class Comparison:
    """Collects rows as a student is scored; hand `add` to :func:`capgap.pipeline.eval.measure.score`."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._num_rows = spool, 0
        self._found: list[torch.Tensor] = []

    def add(self, logprobs_NV: torch.Tensor) -> None:
        """Compare the student's next rows with the teacher's rows of the same place."""
        stop = self._num_rows + len(logprobs_NV)
        teacher_NV = self._spool.rows(self._num_rows, stop).to(logprobs_NV.device)
        self._found.append(compare_rows(teacher_NV, logprobs_NV).cpu())
        self._num_rows = stop

    def kl_of_sequences(self, labels_S: Int64Array) -> Float64Array:
        """KL of each sequence, summed over its labels [S]; `labels_S` is how many rows each one has."""
        return sums_of_sequences(torch.cat(self._found)[:, 0].numpy(), labels_S)

    def result(
        self, name: str, labels_S: Int64Array | None = None, weights_RS: Int64Array | None = None
    ) -> AgainstTeacher:
        """Means over the rows so far, with intervals over sequences where their labels and weights are given.

        Raises:
            InputError: the KL is infinite; `name` is the student's.
        """
        rows_N4 = torch.cat(self._found)
        kl, top1, top5, acceptance = rows_N4.mean(dim=0).tolist()
        if not math.isfinite(kl):
            raise InputError(
                "the KL to the teacher is not a number",
                where=name,
                found=kl,
                fix="an id that the teacher uses has probability 0 in the student; look for masked logits",
            )
        found = AgainstTeacher(kl=max(kl, 0.0), top1=top1, top5=top5, acceptance=min(acceptance, 1.0))
        if labels_S is None or weights_RS is None:
            return found
        intervals = {
            f"{quantity}_interval": bootstrap_interval(
                sums_of_sequences(rows_N4[:, column].numpy(), labels_S), labels_S, weights_RS
            )
            for column, quantity in enumerate(("kl", "top1", "top5", "acceptance"))
        }
        return found.model_copy(update=intervals)


def sums_of_sequences(values_N: Float64Array, labels_S: Int64Array) -> Float64Array:
    """Sums over the rows of each sequence, which stand one after the other: `labels_S` rows each, at least one."""
    sums_S: Float64Array = np.add.reduceat(values_N, np.cumsum(labels_S) - labels_S)
    return sums_S


def compare_rows(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), top-1 agreement, top-5 agreement and acceptance of each row: float64 [N, 4].

    Both are float32 logprobs. Terms are float32, sums float64; an id to which the teacher gives probability 0 adds 0
    to the KL.
    """
    p_NV, q_NV = teacher_NV.exp(), student_NV.exp()
    terms_NV = torch.where(p_NV > 0, p_NV * (teacher_NV - student_NV), 0.0)
    num_top = min(_NUM_TOP, teacher_NV.shape[1])
    teacher_NK = teacher_NV.topk(num_top).indices
    student_NK = student_NV.topk(num_top).indices
    shared_NK = (teacher_NK[:, :, None] == student_NK[:, None, :]).any(-1)
    return torch.stack(
        [
            terms_NV.sum(dim=1, dtype=torch.float64),
            (teacher_NK[:, 0] == student_NK[:, 0]).double(),
            shared_NK.double().mean(dim=1),
            torch.minimum(p_NV, q_NV).sum(dim=1, dtype=torch.float64),
        ],
        dim=1,
    )
