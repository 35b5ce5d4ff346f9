"""The mean over all labels of a step, whatever micro-batches and ranks they are on.

A micro-batch's loss is the mean over its own labels. Where loss masks leave micro-batches different numbers of labels,
the mean of these means is not the mean over the step. So each loss is weighted by its micro-batch's share of labels,
and the gradient is divided by the sum of the shares.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed
from torch.distributed.tensor import DTensor


class LabelShares:
    """Adds up the shares of labels of a step's micro-batches, and rescales the step's gradient by them."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def weigh(self, loss: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro-batch times its share of labels; it is unchanged where the share is 1.

        Args:
            loss: The mean over the labels of the micro-batch, a scalar.
            share: The sum of the weights of the rows with a label, over the number of all rows; a scalar.
        """
        self._sum = share if self._sum is None else self._sum + share
        return loss * share.to(loss.dtype)

    def settle(self, parameters: Iterable[torch.nn.Parameter], num_micro_batches: int) -> None:
        """Rescale the gradient of the mean over a step's micro-batches into that of the mean over the step's labels.

        Args:
            parameters: The parameters whose gradients are rescaled in place.
            num_micro_batches: Number of micro-batches in a step, over all ranks.
        """
        assert self._sum is not None
        total, self._sum = self._sum, None
        if distributed.is_initialized():
            distributed.all_reduce(total)
        # A step without any label has no gradient.
        factor = torch.where(total > 0, num_micro_batches / total, 0.0)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            # In another dtype than the gradients' a GPU would scale them one by one; below float32 it would be inexact.
            factor = factor.to(torch.promote_types(gradients[0].dtype, torch.float32))
            torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
