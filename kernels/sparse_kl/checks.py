"""The checks that all forms of the loss share. They read only shapes and settings, so they need no host sync.

Legend: N rows (tokens), K ids kept a row, V columns of the head, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from capgap.kernels.sparse_kl.divergence import Divergence, Tail, check_pair
from capgap.kernels.sparse_kl.targets import SparseTargets, expect, looks

_LEAST_WORKSPACE_CPU = 16 * 2**20  # bytes; a chunk's logits and their gradients stay in the cache
_LEAST_WORKSPACE = 512 * 2**20  # bytes; 2000 rows of a large vocabulary, below which a GPU's matrix products are slower


@dataclass(frozen=True)
class Loss:
    """The settings of one call of the loss.

    Attributes:
        alpha: Weight of the divergence, in [0, 1]; the cross-entropy has weight 1 - alpha.
        temperature: The student's logits are divided by it for the divergence.
        divergence: Name of the divergence.
        tail: Treatment of the teacher's probability outside the kept ids; None means `ghost` if the targets have a tail
            and `drop` otherwise.
        beta: The parameter beta of `jsd`, in (0, 1).
        softcap: c, if the model's logits are c tanh(logits / c); None without a softcap.
    """

    alpha: float
    temperature: float
    divergence: Divergence
    tail: Tail | None
    beta: float
    softcap: float | None

    def checked(self, targets: SparseTargets) -> Tail:
        """Check that the settings fit one another and the targets, and return the treatment of the tail.

        Raises:
            ValueError: A setting does not fit; the message names it, its value and the expected value.
        """
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha: got {self.alpha}, expected a number in [0, 1]")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: got {self.temperature}, expected a finite number above 0")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta: got {self.beta}, expected a number between 0 and 1")
        check_softcap(self.softcap)
        tail: Tail = self.tail or ("drop" if targets.tail_N is None else "ghost")
        check_pair(targets.recording, self.divergence, tail)
        if tail in ("ghost", "label") and targets.tail_N is None:
            raise ValueError(f"tail: got {tail!r} with targets.tail_N None, expected targets with their tail")
        return tail


def check_softcap(softcap: float | None) -> None:
    """Raise ValueError unless the softcap is None or a finite number above 0."""
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"softcap: got {softcap}, expected a finite number above 0, or None")


def check_arguments(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    row_weights_N: Tensor | None,
    bias_V: Tensor | None,
) -> None:
    """Raise an error if shapes, dtypes or devices do not fit.

    Raises:
        TypeError: A tensor is a DTensor, of which this process holds only a part.
        ValueError: An argument does not fit; the message names it, what was passed and what was expected.
    """
    for name, tensor in (("hidden_NH", hidden_NH), ("weight_VH", weight_VH), ("bias_V", bias_V)):
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name}: got a DTensor {list(tensor.shape)}, expected a plain tensor; call the loss inside the "
                "forward of the module that FSDP2 shards, where parameters are whole, or pass tensor.full_tensor(); "
                "a head split by vocabulary goes to vocab_parallel_sparse_kl with tensor.to_local()"
            )
    if hidden_NH.dim() != 2 or not hidden_NH.is_floating_point():
        raise ValueError(f"hidden_NH: got {looks(hidden_NH)}, expected [N, H] of a floating dtype")
    num_rows, width = hidden_NH.shape
    if weight_VH.dim() != 2 or weight_VH.shape[1] != width or weight_VH.shape[0] == 0:
        raise ValueError(f"weight_VH: got {looks(weight_VH)}, expected [V, {width}]")
    expect("weight_VH", weight_VH, tuple(weight_VH.shape), hidden_NH)
    if bias_V is not None:
        expect("bias_V", bias_V, (weight_VH.shape[0],), hidden_NH)
    if len(targets) != num_rows or targets.ids_NK.device != hidden_NH.device:
        raise ValueError(f"targets.ids_NK: got {looks(targets.ids_NK)}, expected [{num_rows}, K] on hidden's device")
    if labels_N.is_floating_point() or labels_N.element_size() != 8 or labels_N.shape != (num_rows,):
        raise ValueError(f"labels_N: got {looks(labels_N)}, expected [{num_rows}] torch.int64")
    if labels_N.device != hidden_NH.device:
        raise ValueError(f"labels_N: got {labels_N.device}, expected {hidden_NH.device}")
    if row_weights_N is not None:
        expect("row_weights_N", row_weights_N, (num_rows,), hidden_NH)


def check_vocab_size(vocab_size: int | None, num_columns: int) -> int:
    """Return the number of real columns, which is `num_columns` if `vocab_size` is None.

    Raises:
        ValueError: `vocab_size` is below 1 or above `num_columns`.
    """
    if vocab_size is not None and not 1 <= vocab_size <= num_columns:
        raise ValueError(f"vocab_size: got {vocab_size}, expected 1 to {num_columns}, the rows of weight_VH")
    return num_columns if vocab_size is None else vocab_size


def workspace_bytes(workspace_mb: int | None, hidden_NH: Tensor, weight_VH: Tensor) -> int:
    """Return the size of the logits' buffer in bytes: as requested, or the fastest one that needs no extra memory.

    Each chunk reads and writes the whole gradient of the head, so there should be few chunks. Backward needs at least
    2 V H bytes in every precision for the scaled gradient of the head; the forward pass can use this memory for free.

    Raises:
        ValueError: `workspace_mb` is below 1.
    """
    if workspace_mb is None:
        return max(_LEAST_WORKSPACE_CPU if hidden_NH.device.type == "cpu" else _LEAST_WORKSPACE, 2 * weight_VH.numel())
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb: got {workspace_mb}, expected at least 1, or None")
    return workspace_mb * 2**20


def in_compute_dtype(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """Return the hidden states in the dtype of the products, which is the autocast dtype if autocast is on.

    Raises:
        ValueError: Autocast is off, and the head or its bias has another dtype than the hidden states.
    """
    if torch.is_autocast_enabled(hidden_NH.device.type):
        return hidden_NH.to(torch.get_autocast_dtype(hidden_NH.device.type))
    if weight_VH.dtype != hidden_NH.dtype or (bias_V is not None and bias_V.dtype != hidden_NH.dtype):
        raise ValueError(f"weight_VH, bias_V: got {weight_VH.dtype}, expected {hidden_NH.dtype}, the dtype of hidden")
    return hidden_NH
