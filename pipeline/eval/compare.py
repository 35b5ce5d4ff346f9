"""A student's distributions against the teacher's full ones.

Legend: N rows, V real vocabulary, K likeliest ids.
"""

from __future__ import annotations

import math

import torch

from capgap.pipeline.eval.spool import Spool
from capgap.schemas.errors import InputError
from capgap.schemas.results import AgainstTeacher

_NUM_TOP = 5


class Comparison:
    """Sums over rows as a student is scored; hand `add` to :func:`capgap.pipeline.eval.measure.score`."""

    def __init__(self, spool: Spool) -> None:
        self._spool, self._num_rows = spool, 0
        self._sums = torch.zeros(4, dtype=torch.float64)

    def add(self, logprobs_NV: torch.Tensor) -> None:
        """Compare the student's next rows with the teacher's rows of the same place."""
        stop = self._num_rows + len(logprobs_NV)
        teacher_NV = self._spool.rows(self._num_rows, stop).to(logprobs_NV.device)
        self._sums += compare_rows(teacher_NV, logprobs_NV).cpu()
        self._num_rows = stop

    def result(self, name: str) -> AgainstTeacher:
        """Means over the rows so far.

        Raises:
            InputError: the KL is infinite; `name` is the student's.
        """
        kl, top1, top5, acceptance = (self._sums / self._num_rows).tolist()
        if not math.isfinite(kl):
            raise InputError(
                "the KL to the teacher is not a number",
                where=name,
                found=kl,
                fix="an id that the teacher uses has probability 0 in the student; look for masked logits",
            )
        return AgainstTeacher(kl=max(kl, 0.0), top1=top1, top5=top5, acceptance=min(acceptance, 1.0))


def compare_rows(teacher_NV: torch.Tensor, student_NV: torch.Tensor) -> torch.Tensor:
    """Sums over rows of KL(teacher || student), top-1 agreement, top-5 agreement and acceptance: float64 [4].

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
            terms_NV.sum(dtype=torch.float64),
            (teacher_NK[:, 0] == student_NK[:, 0]).sum(dtype=torch.float64),
            shared_NK.double().mean(1).sum(),
            torch.minimum(p_NV, q_NV).sum(dtype=torch.float64),
        ]
    )
