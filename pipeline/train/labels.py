"""The mean over a step's labels, whichever micro-batches and ranks they lie in.

A micro-batch's loss is the mean over its own labels. Where masks leave them different numbers, the mean of these means
is not the step's: each is weighted by its share of labels, and the gradient divided by the sum of the shares.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed
from torch.distributed.tensor import DTensor


class LabelShares:
    """Counts the labels of a step while its micro-batches go by."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def weigh(self, loss: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch by its share: the weights of the rows that count over the number of all rows.

        Exactly itself where every row counts as one.
        """
        self._sum = share if self._sum is None else self._sum + share
        return loss * share.to(loss.dtype)

    def settle(self, parameters: Iterable[torch.nn.Parameter], num_micro_batches: int) -> None:
        """Turn gradients, the mean over a step's micro-batches on all ranks, into those of the mean over its labels."""
        assert self._sum is not None
        total, self._sum = self._sum, None
        if distributed.is_initialized():
            distributed.all_reduce(total)
        # without a label there is no gradient either
        factor = torch.where(total > 0, num_micro_batches / total, 0.0)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            # of the gradients' dtype, or a GPU would go through them one by one; float32 at least, to be exact
            factor = factor.to(torch.promote_types(gradients[0].dtype, torch.float32))
            torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
