"""Compare a student's distributions with the teacher's full distributions.

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
    """Compares rows as a student is scored: give `add` to :func:`capgap.pipeline.eval.measure.score` as `visit`."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._num_rows = spool, 0
        self._found: list[torch.Tensor] = []

    def add(self, logprobs_NV: torch.Tensor) -> None:
        """Compare the student's next rows with the teacher's rows of the same positions."""
        stop = self._num_rows + len(logprobs_NV)
        teacher_NV = self._spool.rows(self._num_rows, stop).to(logprobs_NV.device)
        self._found.append(compare_rows(teacher_NV, logprobs_NV).cpu())
        self._num_rows = stop

    def kl_of_sequences(self, labels_S: Int64Array) -> Float64Array:
        """Return the KL of each sequence, summed over its labels, in nats [S]; `labels_S` is its number of rows."""
        return sums_of_sequences(torch.cat(self._found)[:, 0].numpy(), labels_S)

    def result(
        self, name: str, labels_S: Int64Array | None = None, weights_RS: Int64Array | None = None
    ) -> AgainstTeacher:
        """Return the means over the rows so far, with intervals over sequences where labels and weights are given.

        Args:
            name: Name of the student, for errors.
            labels_S: Number of labels of each sequence [S].
            weights_RS: Weights of the bootstrap's resamples [R, S].

        Raises:
            InputError: The KL is infinite or not a number.
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
    """Sum values over each sequence's consecutive rows [S]; sequence s has `labels_S[s]` rows, at least one."""
    sums_S: Float64Array = np.add.reduceat(values_N, np.cumsum(labels_S) - labels_S)
    return sums_S


def compare_rows(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student), top-1 agreement, top-5 agreement and acceptance of each row: float64 [N, 4].

    Both arguments are float32 logprobs. The KL is in nats. Terms are float32 and sums float64; an id to which the
    teacher gives probability 0 adds 0 to the KL.
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
