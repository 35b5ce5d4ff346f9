"""Rows as they were recorded -> rows as a kernel takes them: only those that count, checked, tail placed, ids merged.

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
        hidden_nH: their hidden states.
        rows: the rest of them.
        weights_n: their weights.
        live_n: their places among the N, int64, ascending; None where that is all of them.
        num_rows: N.
    """

    hidden_nH: Tensor
    rows: Rows
    weights_n: Tensor
    live_n: Tensor | None
    num_rows: int

    def mean(self, kl_n: Tensor, ce_n: Tensor, alpha: float, temperature: float) -> tuple[Tensor, Tensor]:
        """The loss, and 1 / the sum of weights, of which 0 is taken for 1 / 0."""
        total = self.weights_n.sum()
        per_weight = torch.where(total != 0, 1 / total, 0.0)
        loss_n = alpha * temperature**2 * kl_n + (1 - alpha) * ce_n
        return (self.weights_n * loss_n).sum() * per_weight, per_weight

    def spread(self, rows_n: Tensor) -> Tensor:
        """The n rows at their places among the N, 0 elsewhere."""
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
    """The rows that count; without ids they have no divergence.

    Raises:
        ValueError: on a CPU, a target is not finite or below 0. Elsewhere the row's weight becomes NaN, and the loss.
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
    """The places of the rows that count; None where that is all of them."""
    is_cpu = labels_N.device.type == "cpu"
    if num_counted == len(labels_N) and not is_cpu:
        return None
    live_N = (labels_N >= 0) & (labels_N < vocab_size)
    if row_weights_N is not None:
        live_N &= row_weights_N != 0
    # to a CPU looking costs no more than believing
    if num_counted is not None and not is_cpu:
        return torch.nonzero_static(live_N, size=num_counted)[:, 0]
    found_n = live_N.nonzero()[:, 0]
    return None if len(found_n) == len(live_N) else found_n


def sum_dtype(hidden_NH: Tensor) -> torch.dtype:
    """The dtype of softmax, losses and sums."""
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
    """Ids [N, K], int32, probabilities [N, K] and that of the tail's cell [N]; K is one more under `label`.

    An id outside [0, V) is padding, and so is one of probability 0. Adding repeats up takes a sort of [N, K], which is
    left out where they are known to be distinct.
    """
    if checked:
        ids_NK = ids_NK.clamp(0, vocab_size)  # whatever is wrong with them, no other memory is written to
    else:
        valid_NK = (ids_NK >= 0) & (ids_NK < vocab_size) & (p_NK > 0)
        ids_NK, p_NK = ids_NK.where(valid_NK, vocab_size), p_NK.where(valid_NK, 0.0)
    ids_NK = ids_NK.to(torch.int32)
    left_N = p_NK.new_zeros(len(p_NK)) if tail_N is None else tail_N.clamp_min(0)
    if tail == "renorm":
        p_NK = p_NK / p_NK.sum(-1, keepdim=True).clamp_min(torch.finfo(p_NK.dtype).tiny)
    elif tail == "label":
        is_label_NK = (ids_NK == labels_N[:, None]) & (p_NK > 0)
        # to the label's own entry where it has one, and to one more where it has none
        p_NK = torch.where(is_label_NK, p_NK + left_N[:, None], p_NK) if checked else p_NK
        more_N = left_N.masked_fill(is_label_NK.any(-1), 0.0) if checked else left_N
        ids_NK = torch.cat([ids_NK, labels_N.to(torch.int32)[:, None]], dim=1)
        p_NK = torch.cat([p_NK, more_N[:, None]], dim=1)
    # on a CPU looking costs no sync, and numpy sorts short rows twenty times as fast as torch
    if not checked and (ids_NK.device.type != "cpu" or _any_repeat(ids_NK, vocab_size)):
        ids_NK, p_NK = _merge(ids_NK, p_NK)
    return ids_NK, p_NK, left_N if tail == "ghost" else torch.zeros_like(left_N)


def _refuse_unfit(p_nK: Tensor, left_n: Tensor | None, weights_n: Tensor, live_n: Tensor | None) -> Tensor:
    """The weights, NaN where a target is NaN, infinite or below 0, or a tail is not finite; raises on a CPU."""
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
    """Whether an id stands twice in a row; that of padding may."""
    sorted_NK = np.sort(ids_NK.numpy(), axis=-1)
    return bool(((sorted_NK[:, :-1] == sorted_NK[:, 1:]) & (sorted_NK[:, 1:] < vocab_size)).any())


def _merge(ids_NK: Tensor, p_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted ids, and at the last of each id's entries the sum of all of them, 0 at the others.

    Sums by doubling: after the step of width w an entry holds the sum of up to 2 w entries of its id. Nothing is
    subtracted, and there is no scatter whose order could differ.
    """
    ids_NK, order_NK = ids_NK.sort(dim=-1, stable=True)  # stable: equal bits from run to run
    p_NK = p_NK.gather(1, order_NK)
    followed_NK = ids_NK[:, :-1] == ids_NK[:, 1:]
    width, top_k = 1, ids_NK.shape[1]
    while width < top_k:
        same_NK = ids_NK[:, width:] == ids_NK[:, :-width]
        p_NK = torch.cat([p_NK[:, :width], p_NK[:, width:] + p_NK[:, :-width].where(same_NK, 0.0)], dim=1)
        width *= 2
    return ids_NK, torch.cat([p_NK[:, :-1].masked_fill(followed_NK, 0.0), p_NK[:, -1:]], dim=1)
