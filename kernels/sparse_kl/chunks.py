"""The matrix products with the head and their gradients, in chunks of rows, with one reused buffer for logits.

    for each chunk: buffer = hidden @ head^T  ->  rows kernel: buffer becomes its gradient  ->  two products

The gradients are those of the weighted sum over rows; the division by the sum of weights comes later. They are summed
in the dtype of the row factors, float32 or float64, so that rounding errors of many bfloat16 chunks do not add up.

Legend: N rows, n rows of non-zero weight, C rows of a chunk, P columns of the buffer, V columns of the head, H hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.rows import Rows, RowSettings, RowsKernel

_PITCH = 16  # the buffer's rows begin at multiples of it, so that loads are wide even if V is odd


class Gradients(NamedTuple):
    """Gradients of hidden [n, H], head [V, H] and bias [V]; a gradient that is not needed is None."""

    hidden_nH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


class Needs(NamedTuple):
    """Which gradients are needed; the product of a gradient that is not needed is left out."""

    hidden: bool
    weight: bool
    bias: bool


def run_chunks(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    rows: Rows,
    settings: RowSettings,
    kernel: RowsKernel,
    needs: Needs,
    num_chunk_rows: int,
) -> tuple[Tensor, Tensor, Gradients]:
    """Return each row's divergence [n] and cross-entropy [n], nats, and the gradients of the weighted sum.

    Products are computed in the dtype of hidden.
    """
    vocab_size = settings.vocab_size
    real_VH = weight_VH[:vocab_size].to(hidden_nH.dtype)
    real_bias_V = None if bias_V is None else bias_V[:vocab_size].to(hidden_nH.dtype)
    sums = _Sums(hidden_nH, weight_VH, vocab_size, rows.ckl_N.dtype, needs)
    num_rows = hidden_nH.shape[0]
    buffer_CP = hidden_nH.new_empty((num_chunk_rows, pitch(vocab_size)))
    if buffer_CP.device.type == "cpu":
        # oneDNN's 16-bit product with AMX reads beyond its columns and multiplies what it finds by 0. NaN in
        # uninitialized memory would stay NaN (seen with torch 2.13), so the memory is cleared
        buffer_CP[:, vocab_size:].zero_()
    kl_n, ce_n = rows.ckl_N.new_empty(num_rows), rows.ckl_N.new_empty(num_rows)
    for start in range(0, num_rows, len(buffer_CP)):
        chunk = slice(start, min(start + len(buffer_CP), num_rows))
        logits_CP = buffer_CP[: chunk.stop - start]
        logits_CV = logits_CP[:, :vocab_size]
        if real_bias_V is None:
            torch.mm(hidden_nH[chunk], real_VH.t(), out=logits_CV)
        else:
            torch.addmm(real_bias_V, hidden_nH[chunk], real_VH.t(), out=logits_CV)
        kl_n[chunk], ce_n[chunk] = kernel(logits_CP, rows.part(chunk), settings, any(needs))
        sums.add(chunk, logits_CV, hidden_nH[chunk], real_VH)
    return kl_n, ce_n, sums.gradients


class _Sums:
    """Sums the gradients over chunks; the gradients of padded columns stay 0."""

    def __init__(self, hidden_nH: Tensor, weight_VH: Tensor, vocab_size: int, dtype: torch.dtype, needs: Needs) -> None:
        self._vocab_size, self._first = vocab_size, True
        self.gradients = Gradients(
            torch.empty(hidden_nH.shape, dtype=hidden_nH.dtype, device=hidden_nH.device) if needs.hidden else None,
            torch.empty(weight_VH.shape, dtype=dtype, device=weight_VH.device) if needs.weight else None,
            torch.zeros(weight_VH.shape[:1], dtype=dtype, device=weight_VH.device) if needs.bias else None,
        )
        if self.gradients.weight_VH is not None:
            self.gradients.weight_VH[vocab_size if len(hidden_nH) else 0 :].zero_()

    def add(self, chunk: slice, d_logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
        d_hidden_nH, d_weight_VH, d_bias_V = self.gradients
        if d_hidden_nH is not None:
            torch.mm(d_logits_CV, weight_VH, out=d_hidden_nH[chunk])
        if d_weight_VH is not None:
            self._add_weight(d_weight_VH[: self._vocab_size], d_logits_CV, hidden_CH)
        if d_bias_V is not None:
            d_bias_V[: self._vocab_size] += d_logits_CV.sum(0, dtype=d_bias_V.dtype)
        self._first = False

    def _add_weight(self, d_weight_VH: Tensor, d_logits_CV: Tensor, hidden_CH: Tensor) -> None:
        widens = d_weight_VH.dtype != d_logits_CV.dtype
        if widens and has_wide_products(d_logits_CV.device):
            # tensor cores sum in float32, so the product is added without a rounding and without a tensor for it
            if self._first:
                torch.mm(d_logits_CV.t(), hidden_CH, out_dtype=d_weight_VH.dtype, out=d_weight_VH)
            else:
                torch.addmm(d_weight_VH, d_logits_CV.t(), hidden_CH, out_dtype=d_weight_VH.dtype, out=d_weight_VH)
        elif widens:
            product_VH = d_logits_CV.t() @ hidden_CH
            d_weight_VH.copy_(product_VH) if self._first else d_weight_VH.add_(product_VH)
        elif self._first:
            torch.mm(d_logits_CV.t(), hidden_CH, out=d_weight_VH)
        else:
            d_weight_VH.addmm_(d_logits_CV.t(), hidden_CH)


def has_wide_products(device: torch.device) -> bool:
    """Return whether products of 16-bit matrices can give float32: on NVIDIA's GPUs of compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def chunk_rows(num_rows: int, row_bytes: int, workspace_bytes: int) -> int:
    """Return the rows of a chunk for as few equal chunks as the workspace allows; at least one row."""
    num_rows = max(1, num_rows)
    num_chunks = -(-num_rows // max(1, workspace_bytes // row_bytes))
    return -(-num_rows // num_chunks)


def pitch(vocab_size: int) -> int:
    """Return the number of columns of the buffer: a multiple of 16, and at least one more than the vocabulary."""
    return (vocab_size // _PITCH + 1) * _PITCH
