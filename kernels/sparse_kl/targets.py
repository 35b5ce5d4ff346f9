"""The targets that the loss takes, and the results that it returns.

Legend: N rows (tokens), K ids kept a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.divergence import Recording


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distribution after each of N tokens, on K ids.

    The weights of sampled ids are counts / n, which sum to 1 in a row, and there is no tail. The weights of top-k
    tokens are their probabilities, which sum to 1 together with the tail.

    Attributes:
        ids_NK: Token ids, int64. The weights of a repeated id are added. An id outside [0, vocab_size) is padding, and
            its weight is ignored.
        weights_NK: Probabilities, float32; 0 marks padding.
        tail_N: Probability of all other ids together, float32; None for samples. Values below 0 count as 0.
        recording: `topk` or `sampled`; it determines which divergences are allowed.
        checked: Whether it is known that, in each row, ids of nonzero weight are distinct and in the vocabulary, and
            that all probabilities are finite and at least 0, as in caches that capgap has written. The checks, which
            cost a sort of [N, K], are then left out.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or samples have a tail.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    tail_N: Tensor | None = None
    recording: Recording = "topk"
    checked: bool = False

    def __post_init__(self) -> None:
        if self.ids_NK.dim() != 2 or self.ids_NK.is_floating_point() or self.ids_NK.element_size() != 8:
            raise ValueError(f"ids_NK: got {looks(self.ids_NK)}, expected [N, K] torch.int64")
        expect("weights_NK", self.weights_NK, tuple(self.ids_NK.shape), self.ids_NK)
        if self.tail_N is not None:
            expect("tail_N", self.tail_N, (self.ids_NK.shape[0],), self.ids_NK)
        if self.recording == "sampled" and self.tail_N is not None:
            raise ValueError("tail_N: got a tensor with sampled targets, expected None; samples have no tail")

    def __len__(self) -> int:
        return self.ids_NK.shape[0]

    @classmethod
    def topk(cls, ids_NK: Tensor, logprobs_NK: Tensor, tail_N: Tensor | None) -> SparseTargets:
        """Make targets from the logprobs of top-k tokens (-inf marks padding) and the probability of all other ids."""
        return cls(ids_NK, logprobs_NK.exp(), tail_N, "topk")

    @classmethod
    def sampled(cls, ids_NK: Tensor, counts_NK: Tensor, num_samples: int) -> SparseTargets:
        """Make targets from sampled ids and their counts among `num_samples` samples (a count of 0 marks padding)."""
        return cls(ids_NK, counts_NK.to(torch.float32) / num_samples, None, "sampled")


class SparseKl(NamedTuple):
    """The results of the loss.

    Attributes:
        loss: The weighted mean, a scalar, float32 (float64 for float64 inputs), nats. Only this part is differentiable.
        kl_N: Divergence of each row at the given temperature, without T^2, nats; 0 in rows of weight 0. None if it was
            neither needed nor asked for.
        ce_N: Cross-entropy of each row at temperature 1, nats; 0 in rows of weight 0.
    """

    loss: Tensor
    kl_N: Tensor | None
    ce_N: Tensor


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise ValueError unless `tensor` has a floating dtype, this shape and the device of `like`."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name}: got {looks(tensor)}, expected {list(shape)} of a floating dtype")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got {tensor.device}, expected {like.device}")


def looks(tensor: Tensor) -> str:
    """Return the tensor's shape, dtype and device, for messages."""
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
