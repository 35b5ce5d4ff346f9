"""The products of the head and their gradients, row chunk by row chunk, around one reused logits buffer.

The gradients are those of the weighted sum over rows; what it is divided by comes later. They add up in the dtype of
the row scales, float32 or float64, so many chunks of bfloat16 do not drift.

Legend: N rows, n rows of non-zero weight, C rows of a chunk, B rows of a block, P columns of the buffer, V columns of
the head, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.rows import Rows, gradient_in_place

_BLOCK_ELEMENTS_CPU = 2**19  # 2 MiB of float32: the passes over a block stay in the cache
_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32: few launches, and a bounded second block at T other than 1
_PITCH = 16  # the buffer's rows begin at multiples of it, for wide loads where V is odd


class Gradients(NamedTuple):
    """Gradients of hidden [N, H], head [V, H] and bias [V]; None where it was not asked for."""

    hidden_NH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


@dataclass(frozen=True)
class Chunks:
    """How the rows are gone through.

    Attributes:
        rows: all N rows.
        live_n: the rows of non-zero weight, int64, ascending; None where that is all of them.
        vocab_size: real columns of the head.
        temperature: of the KL.
        workspace_bytes: size of the buffer; at least one row is held whatever it says.
    """

    rows: Rows
    live_n: Tensor | None
    vocab_size: int
    temperature: float
    workspace_bytes: int

    def run(
        self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, Gradients]:
        """KL [N] and cross-entropy [N], both 0 in rows of weight 0, and the gradients that `needs` asks for."""
        hidden_nH = hidden_NH if self.live_n is None else hidden_NH[self.live_n]
        rows = self.rows if self.live_n is None else self.rows.part(self.live_n)
        real_VH = weight_VH[: self.vocab_size]
        real_bias_V = None if bias_V is None else bias_V[: self.vocab_size]
        grads = self._start(hidden_nH, weight_VH, bias_V, needs)

        num_rows = hidden_nH.shape[0]
        buffer_CP = self._buffer(hidden_nH)
        kl_n, ce_n = rows.kl_scale_B.new_empty((2, num_rows))
        for start in range(0, num_rows, len(buffer_CP)):
            chunk = slice(start, min(start + len(buffer_CP), num_rows))
            logits_CP = buffer_CP[: chunk.stop - start]
            logits_CV = logits_CP[:, : self.vocab_size]
            if real_bias_V is None:
                torch.mm(hidden_nH[chunk], real_VH.t(), out=logits_CV)
            else:
                torch.addmm(real_bias_V, hidden_nH[chunk], real_VH.t(), out=logits_CV)
            kl_n[chunk], ce_n[chunk] = self._differentiate(logits_CP, rows.part(chunk), any(needs))
            _add(grads, chunk, logits_CV, hidden_nH[chunk], real_VH)
        if grads.hidden_NH is not None:
            grads = grads._replace(hidden_NH=self._spread(grads.hidden_NH))
        return self._spread(kl_n), self._spread(ce_n), grads

    def _start(self, hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, needs: tuple[bool, ...]) -> Gradients:
        """Zeros, but for hidden, which has the n live rows only and is written once."""
        dtype = self.rows.kl_scale_B.dtype
        return Gradients(
            torch.empty_like(hidden_nH) if needs[0] else None,
            torch.zeros(weight_VH.shape, dtype=dtype, device=weight_VH.device) if needs[1] else None,
            torch.zeros(bias_V.shape, dtype=dtype, device=bias_V.device) if bias_V is not None and needs[2] else None,
        )

    def _buffer(self, hidden_nH: Tensor) -> Tensor:
        """Equal chunks, as few as the workspace allows; at least one column more than the vocabulary."""
        num_rows = max(1, hidden_nH.shape[0])
        pitch = (self.vocab_size // _PITCH + 1) * _PITCH
        most_rows = max(1, self.workspace_bytes // (pitch * hidden_nH.element_size()))
        num_chunks = -(-num_rows // most_rows)
        return hidden_nH.new_empty((-(-num_rows // num_chunks), pitch))

    def _differentiate(self, logits_CP: Tensor, rows: Rows, want_gradient: bool) -> tuple[Tensor, Tensor]:
        """KL [C] and cross-entropy [C]; the logits become their gradient, block by block."""
        elements = _BLOCK_ELEMENTS_CPU if logits_CP.device.type == "cpu" else _BLOCK_ELEMENTS
        block_rows = max(1, elements // logits_CP.shape[1])
        kl_C, ce_C = rows.kl_scale_B.new_empty((2, len(logits_CP)))
        for start in range(0, len(logits_CP), block_rows):
            block = slice(start, start + block_rows)
            stored_BP = logits_CP[block]
            logits_BP = stored_BP.to(kl_C.dtype)
            kl_C[block], ce_C[block] = gradient_in_place(
                logits_BP, self.vocab_size, rows.part(block), self.temperature, want_gradient
            )
            if want_gradient and logits_BP is not stored_BP:
                stored_BP.copy_(logits_BP)
        return kl_C, ce_C

    def _spread(self, rows_n: Tensor) -> Tensor:
        """The n live rows at their places among the N, 0 elsewhere."""
        if self.live_n is None:
            return rows_n
        rows_N = rows_n.new_zeros((len(self.rows.labels_B), *rows_n.shape[1:]))
        return rows_N.index_copy_(0, self.live_n, rows_n)


def _add(grads: Gradients, chunk: slice, d_logits_CV: Tensor, hidden_CH: Tensor, weight_VH: Tensor) -> None:
    """Add a chunk's share to the gradients; those of padded columns stay 0."""
    vocab_size = len(weight_VH)
    if grads.hidden_NH is not None:
        torch.mm(d_logits_CV, weight_VH, out=grads.hidden_NH[chunk])
    if grads.weight_VH is not None:
        d_weight_VH = grads.weight_VH[:vocab_size]
        if d_weight_VH.dtype == d_logits_CV.dtype:
            d_weight_VH.addmm_(d_logits_CV.t(), hidden_CH)
        else:
            d_weight_VH += d_logits_CV.t() @ hidden_CH
    if grads.bias_V is not None:
        grads.bias_V[:vocab_size] += d_logits_CV.sum(0, dtype=grads.bias_V.dtype)
