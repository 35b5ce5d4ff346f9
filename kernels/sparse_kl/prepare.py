"""The preparation of recorded rows for a rows kernel: rows that count are selected and checked, and ids are merged.

Legend: N rows, n rows of non-zero weight, K ids kept a row, V real columns, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capgap.kernels.sparse_kl.rows import Rows


@dataclass(frozen=True)
class LiveRows:
    """The rows of non-zero weight.

    Attributes:
        hidden_nH: Their hidden states [n, H].
        rows: Their targets, labels and factors.
        weights_n: Their weights [n].
        live_n: Their indices among the N rows, int64, ascending [n]; None if these are all rows.
        num_rows: N.
    """

    hidden_nH: Tensor
    rows: Rows
    weights_n: Tensor
    live_n: Tensor | None
    num_rows: int

    def mean(self, kl_n: Tensor, ce_n: Tensor, alpha: float, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the loss, and 1 / the sum of weights, which is 0 if the sum is 0."""
        total = self.weights_n.sum()
        per_weight = torch.where(total != 0, 1 / total, 0.0)
        loss_n = alpha * temperature**2 * kl_n + (1 - alpha) * ce_n
        return (self.weights_n * loss_n).sum() * per_weight, per_weight

    def spread(self, rows_n: Tensor) -> Tensor:
        """Put values of the n rows at their indices among the N rows; the other rows are 0."""
        if self.live_n is None:
            return rows_n
        rows_N = rows_n.new_zeros((self.num_rows, *rows_n.shape[1:]))
        return rows_N.index_copy_(0, self.live_n, rows_n)


def live_rows(
    hidden_NH: Tensor,
    ids_NK: Tensor | None,
    p_NK: Tensor | None,
    tail_N: Tensor | None,
    labels_N: Tensor,
    row_weights_N: Tensor | None,
    alpha: float,
    temperature: float,
    tail: str,
    vocab_size: int,
    checked: bool = False,
    num_counted: int | None = None,
) -> LiveRows:
    """Select and prepare the rows of nonzero weight; if ids are None, the rows have no divergence.

    Raises:
        ValueError: On a CPU, a target is not finite or is below 0. Elsewhere, the row's weight and the loss become NaN.
    """
    dtype = sum_dtype(hidden_NH)
    live_n = _places(labels_N, row_weights_N, vocab_size, num_counted)

    def part(rows_N: Tensor) -> Tensor:
        return rows_N.contiguous() if live_n is None else rows_N[live_n]

    labels_n = part(labels_N)
    if row_weights_N is None:
        weights_n = torch.ones(labels_n.shape, dtype=dtype, device=labels_n.device)
    else:
        weights_n = part(row_weights_N).to(dtype)
    if ids_NK is None or p_NK is None:
        ids_nK, p_nK = labels_n.new_empty((len(labels_n), 0), dtype=torch.int32), weights_n.new_empty(len(labels_n), 0)
        p_tail_n = torch.zeros_like(weights_n)
    else:
        p_nK, left_n = part(p_NK).to(dtype), None if tail_N is None else part(tail_N).to(dtype)
        if not checked:
            weights_n = _refuse_unfit(p_nK, left_n, weights_n, live_n)
        ids_nK, p_nK, p_tail_n = prepare(part(ids_NK), p_nK, left_n, labels_n, tail, vocab_size, checked)
    rows = Rows(ids_nK, p_nK, p_tail_n, labels_n, weights_n * (alpha * temperature), weights_n * (1 - alpha))
    hidden_nH = hidden_NH if live_n is None else hidden_NH[live_n]
    return LiveRows(hidden_nH, rows, weights_n, live_n, len(labels_N))


def _places(labels_N: Tensor, row_weights_N: Tensor | None, vocab_size: int, num_counted: int | None) -> Tensor | None:
    """Return the indices of the rows that count; None if all rows count."""
    is_cpu = labels_N.device.type == "cpu"
    if num_counted == len(labels_N) and not is_cpu:
        return None
    live_N = (labels_N >= 0) & (labels_N < vocab_size)
    if row_weights_N is not None:
        live_N &= row_weights_N != 0
    # on a CPU, counting costs no more than trusting the caller's number
    if num_counted is not None and not is_cpu:
        return torch.nonzero_static(live_N, size=num_counted)[:, 0]
    found_n = live_N.nonzero()[:, 0]
    return None if len(found_n) == len(live_N) else found_n


def sum_dtype(hidden_NH: Tensor) -> torch.dtype:
    """Return the dtype of softmax, losses and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32


def prepare(
    ids_NK: Tensor,
    p_NK: Tensor,
    tail_N: Tensor | None,
    labels_N: Tensor,
    tail: str,
    vocab_size: int,
    checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [N, K], int32, their probabilities [N, K], and the probability of the tail's cell [N].

    Under `label`, K grows by one. An id outside [0, V) is padding, and so is an id of probability 0. Adding up repeated
    ids takes a sort of [N, K], which is left out if the ids are known to be distinct.
    """
    if checked:
        ids_NK = ids_NK.clamp(0, vocab_size)  # so that even wrong ids never write to other memory
    else:
        valid_NK = (ids_NK >= 0) & (ids_NK < vocab_size) & (p_NK > 0)
        ids_NK, p_NK = ids_NK.where(valid_NK, vocab_size), p_NK.where(valid_NK, 0.0)
    ids_NK = ids_NK.to(torch.int32)
    left_N = p_NK.new_zeros(len(p_NK)) if tail_N is None else tail_N.clamp_min(0)
    if tail == "renorm":
        p_NK = p_NK / p_NK.sum(-1, keepdim=True).clamp_min(torch.finfo(p_NK.dtype).tiny)
    elif tail == "label":
        is_label_NK = (ids_NK == labels_N[:, None]) & (p_NK > 0)
        # the tail is added to the label's entry if it has one, and otherwise to an additional entry
        p_NK = torch.where(is_label_NK, p_NK + left_N[:, None], p_NK) if checked else p_NK
        more_N = left_N.masked_fill(is_label_NK.any(-1), 0.0) if checked else left_N
        ids_NK = torch.cat([ids_NK, labels_N.to(torch.int32)[:, None]], dim=1)
        p_NK = torch.cat([p_NK, more_N[:, None]], dim=1)
    # on a CPU, a check for repeats needs no sync, and numpy sorts short rows twenty times as fast as torch
    if not checked and (ids_NK.device.type != "cpu" or _any_repeat(ids_NK, vocab_size)):
        ids_NK, p_NK = _merge(ids_NK, p_NK)
    return ids_NK, p_NK, left_N if tail == "ghost" else torch.zeros_like(left_N)


def _refuse_unfit(p_nK: Tensor, left_n: Tensor | None, weights_n: Tensor, live_n: Tensor | None) -> Tensor:
    """Set the weight of rows with an invalid target to NaN, or raise ValueError on a CPU.

    A target is invalid if it is NaN, infinite or below 0, or if its tail is not finite.
    """
    unfit_n = ~((p_nK >= 0) & (p_nK < float("inf"))).all(-1)
    if left_n is not None:
        unfit_n |= ~left_n.isfinite()
    if unfit_n.device.type != "cpu":
        return weights_n.masked_fill(unfit_n, float("nan"))
    if unfit_n.any():
        first = int(unfit_n.nonzero()[0, 0])
        row = first if live_n is None else int(live_n[first])
        left = "" if left_n is None else f" and the tail {float(left_n[first])}"
        raise ValueError(
            f"targets: got {p_nK[first].tolist()}{left} in row {row}, expected finite probabilities of at least 0"
        )
    return weights_n


def _any_repeat(ids_NK: Tensor, vocab_size: int) -> bool:
    """Return whether an id other than padding occurs twice in a row."""
    sorted_NK = np.sort(ids_NK.numpy(), axis=-1)
    return bool(((sorted_NK[:, :-1] == sorted_NK[:, 1:]) & (sorted_NK[:, 1:] < vocab_size)).any())


def _merge(ids_NK: Tensor, p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Sort ids, and add the probabilities of equal ids into the last entry of each id; the other entries become 0.

    The sums are formed by doubling: after the step of width w, an entry holds the sum of up to 2 w entries of its id.
    Nothing is subtracted, and no scatter is used, whose order could differ from run to run.
    """
    ids_NK, order_NK = ids_NK.sort(dim=-1, stable=True)  # stable, so that every run gives the same bits
    p_NK = p_NK.gather(1, order_NK)
    followed_NK = ids_NK[:, :-1] == ids_NK[:, 1:]
    width, top_k = 1, ids_NK.shape[1]
    while width < top_k:
        same_NK = ids_NK[:, width:] == ids_NK[:, :-width]
        p_NK = torch.cat([p_NK[:, :width], p_NK[:, width:] + p_NK[:, :-width].where(same_NK, 0.0)], dim=1)
        width *= 2
    return ids_NK, torch.cat([p_NK[:, :-1].masked_fill(followed_NK, 0.0), p_NK[:, -1:]], dim=1)
