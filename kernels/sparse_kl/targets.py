"""What goes into the loss and what comes out of it, and the checks that every implementation shares.

Legend: N rows (tokens), K ids kept a row, V columns of the head, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class SparseTargets:
    """The teacher's distribution after each of N tokens, on K ids.

    Drawn targets carry counts / n and no tail: a row's weights sum to 1. The likeliest ids carry their probabilities,
    and the tail carries the rest: weights and tail sum to 1 together.

    Attributes:
        ids_NK: token ids, int64. An id may repeat: its weights are added. An id outside [0, vocab_size) is padding,
            and its weight counts nowhere.
        weights_NK: probabilities, float32. 0 marks padding.
        tail_N: probability of every other id together, float32; None for drawn targets. Below 0 reads as 0.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    tail_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids_NK.dim() != 2 or self.ids_NK.is_floating_point() or self.ids_NK.element_size() != 8:
            raise ValueError(f"ids_NK: got {_looks(self.ids_NK)}, expected [N, K] torch.int64")
        _expect("weights_NK", self.weights_NK, tuple(self.ids_NK.shape), self.ids_NK)
        if self.tail_N is not None:
            _expect("tail_N", self.tail_N, (self.ids_NK.shape[0],), self.ids_NK)

    def __len__(self) -> int:
        return self.ids_NK.shape[0]


class SparseKl(NamedTuple):
    """What the loss returns.

    Attributes:
        loss: the weighted mean, a scalar, float32 (float64 for float64 inputs), nats. The only differentiable part.
        kl_N: KL of each row at the given temperature, without T^2; 0 in rows of weight 0. None where it was neither
            needed nor wanted.
        ce_N: cross-entropy of each row at temperature 1; 0 in rows of weight 0.
    """

    loss: Tensor
    kl_N: Tensor | None
    ce_N: Tensor


def check_arguments(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    *,
    alpha: float,
    temperature: float,
    row_weights_N: Tensor | None,
    vocab_size: int | None,
    bias_V: Tensor | None,
) -> int:
    """The number of real columns, once shapes, dtypes, devices and settings fit. Values are not read: no host sync.

    Raises:
        ValueError: names the argument, what was got and what was expected.
    """
    if hidden_NH.dim() != 2 or not hidden_NH.is_floating_point():
        raise ValueError(f"hidden_NH: got {_looks(hidden_NH)}, expected [N, H] of a floating dtype")
    num_rows, width = hidden_NH.shape
    if weight_VH.dim() != 2 or weight_VH.shape[1] != width or weight_VH.shape[0] == 0:
        raise ValueError(f"weight_VH: got {_looks(weight_VH)}, expected [V, {width}]")
    _expect("weight_VH", weight_VH, tuple(weight_VH.shape), hidden_NH)
    num_columns = weight_VH.shape[0]
    if bias_V is not None:
        _expect("bias_V", bias_V, (num_columns,), hidden_NH)
    if len(targets) != num_rows or targets.ids_NK.device != hidden_NH.device:
        raise ValueError(f"targets.ids_NK: got {_looks(targets.ids_NK)}, expected [{num_rows}, K] on hidden's device")
    if labels_N.is_floating_point() or labels_N.element_size() != 8 or labels_N.shape != (num_rows,):
        raise ValueError(f"labels_N: got {_looks(labels_N)}, expected [{num_rows}] torch.int64")
    if labels_N.device != hidden_NH.device:
        raise ValueError(f"labels_N: got {labels_N.device}, expected {hidden_NH.device}")
    if row_weights_N is not None:
        _expect("row_weights_N", row_weights_N, (num_rows,), hidden_NH)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: got {alpha}, expected a number in [0, 1]")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")
    if vocab_size is not None and not 1 <= vocab_size <= num_columns:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {num_columns}, the rows of weight_VH")
    return num_columns if vocab_size is None else vocab_size


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A floating tensor of that shape, on the device of `like`."""
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name}: got {_looks(tensor)}, expected {list(shape)} of a floating dtype")
    if tensor.device != like.device:
        raise ValueError(f"{name}: got {tensor.device}, expected {like.device}")


def _looks(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
