"""What goes into the loss and what comes out of it.

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

    Samples carry counts / n and no tail: a row's weights sum to 1. Top-k tokens carry their probabilities, and the tail
    carries the rest: weights and tail sum to 1 together.

    Attributes:
        ids_NK: token ids, int64. An id may repeat: its weights are added. An id outside [0, vocab_size) is padding,
            and its weight counts nowhere.
        weights_NK: probabilities, float32. 0 marks padding.
        tail_N: probability of every other id together, float32; None for samples. Below 0 reads as 0.
        recording: `topk` or `sampled`; decides which divergences have a meaning.
        checked: whether it is known that ids of non-zero weight are distinct in a row and lie in the vocabulary, and
            that all probabilities are finite and at least 0, as those that a cache's reader hands out are. Then none of
            it is looked at: a look costs a sort of [N, K].

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or samples have a tail.
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
        """The top-k tokens by their logprobs, of which -inf marks padding, and the probability of all others."""
        return cls(ids_NK, logprobs_NK.exp(), tail_N, "topk")

    @classmethod
    def sampled(cls, ids_NK: Tensor, counts_NK: Tensor, num_samples: int) -> SparseTargets:
        """Sampled ids and how often each came up in `num_samples` samples, an integer of which 0 marks padding."""
        return cls(ids_NK, counts_NK.to(torch.float32) / num_samples, None, "sampled")


class SparseKl(NamedTuple):
    """What the loss returns.

    Attributes:
        loss: the weighted mean, a scalar, float32 (float64 for float64 inputs), nats. The only differentiable part.
        kl_N: divergence of each row at the given temperature, without T^2; 0 in rows of weight 0. None where it was
            neither needed nor wanted.
        ce_N: cross-entropy of each row at temperature 1; 0 in rows of weight 0.
    """

    loss: Tensor
    kl_N: Tensor | None
    ce_N: Tensor


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise ValueError unless it is a floating tensor of that shape, on the device of `like`."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name}: got {looks(tensor)}, expected {list(shape)} of a floating dtype")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got {tensor.device}, expected {like.device}")


def looks(tensor: Tensor) -> str:
    """Shape, dtype and device, for messages."""
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
