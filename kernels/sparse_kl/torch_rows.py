"""The rows kernel in torch, for any device and dtype.

A CPU goes through blocks of rows that stay in its cache. Passes over a block: largest, subtract, exp, sum, scale; at a
temperature other than 1 one more exp into a second block, with a softcap one more of its slope. Everything else is
[B, K] or smaller. Padding ids are sent to a column past the vocabulary, so that no step needs a branch.

Legend: N rows of a chunk, B rows of a block, P columns of the buffer (P > V), V real columns, K ids kept a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.divergence import coarse
from capgap.kernels.sparse_kl.rows import Rows, RowSettings

_BLOCK_ELEMENTS_CPU = 2**19  # 2 MiB of float32: the passes over a block stay in the cache
_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32: few launches, and a bounded second block at T other than 1
_NEVER = float("-inf")
# What stands for minus infinity under exp, by which a CPU takes several times as long over -inf and over results that
# are denormal. Beside the largest term, which is 1, a thousand of exp(-64) are below the last bit of float64.
_BELOW_ALL = -64.0


class LogitSums(NamedTuple):
    """All that the loss needs to know of a row's logits.

    Attributes:
        kept_BK: logits of the kept ids; -inf at padding.
        label_B: logit of the label.
        rest_T_B: logsumexp of the other ids' logits / T; -inf where there are none.
        rest_1_B: the same at temperature 1.
    """

    kept_BK: Tensor
    label_B: Tensor
    rest_T_B: Tensor
    rest_1_B: Tensor


def torch_rows(logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """The step that `rows.py` defines, block by block."""
    elements = _BLOCK_ELEMENTS_CPU if logits_NP.device.type == "cpu" else _BLOCK_ELEMENTS
    num_block_rows = max(1, elements // logits_NP.shape[1])
    kl_N, ce_N = rows.ckl_N.new_empty(len(logits_NP)), rows.ckl_N.new_empty(len(logits_NP))
    for start in range(0, len(logits_NP), num_block_rows):
        block = slice(start, start + num_block_rows)
        stored_BP = logits_NP[block]
        logits_BP = stored_BP.to(kl_N.dtype)
        kl_N[block], ce_N[block] = differentiate(logits_BP, rows.part(block), settings, want_gradient)
        if want_gradient and logits_BP is not stored_BP:
            stored_BP.copy_(logits_BP)
    return kl_N, ce_N


def differentiate(
    logits_BP: Tensor,
    rows: Rows,
    settings: RowSettings,
    want_gradient: bool,
    complete: Callable[[LogitSums], LogitSums] | None = None,
) -> tuple[Tensor, Tensor]:
    """Divergence [B] and cross-entropy [B] of a block in the rows' dtype, which becomes the gradient.

    Args:
        logits_BP: as `RowsKernel` takes them, and so are the arguments that follow.
        rows: likewise.
        settings: likewise.
        want_gradient: likewise.
        complete: where the block holds a part of the vocabulary only: makes its sums those of the whole. Ids and
            labels of other parts then stand at column V, with their probability.
    """
    vocab_size, temperature = settings.vocab_size, settings.temperature
    ids_BK, label_B1 = rows.ids_NK.long(), rows.labels_N[:, None]
    slope_BP = None if settings.softcap is None else _cap_in_place(logits_BP, settings.softcap, want_gradient)
    logits_BP[:, vocab_size:] = _NEVER

    columns_BK = ids_BK.where(rows.p_NK > 0, vocab_size)
    label_B = logits_BP.gather(1, label_B1)[:, 0]
    kept_BK = logits_BP.gather(1, columns_BK)
    logits_BP.scatter_(1, columns_BK, _NEVER)
    rest = _exp_in_place(logits_BP, columns_BK, vocab_size, temperature)
    local = LogitSums(kept_BK, label_B, rest.log_sum_T_B, rest.log_sum_1_B)
    sums = local if complete is None else complete(local)

    all_1_B = torch.logaddexp(sums.rest_1_B, torch.logsumexp(sums.kept_BK, -1))
    all_T_B = all_1_B
    if temperature != 1.0:
        all_T_B = torch.logaddexp(sums.rest_T_B, torch.logsumexp(sums.kept_BK / temperature, -1))
    cells = coarse(
        sums.kept_BK / temperature - all_T_B[:, None],
        sums.rest_T_B - all_T_B,
        rows.p_NK,
        rows.p_tail_N,
        settings.divergence,
        settings.beta,
    )
    ce_B = all_1_B - sums.label_B
    if not want_gradient:
        return cells.value_B, ce_B

    # the others' gradient is that of their cell, by their share of it; this block may hold a part of them
    part_T_B, part_1_B = (local.rest_T_B - sums.rest_T_B).exp(), (local.rest_1_B - all_1_B).exp()
    rest_kl_B = (rows.ckl_N * cells.grad_tail_B * part_T_B).where(local.rest_T_B > _NEVER, 0.0)
    rest_ce_B = rows.cce_N * part_1_B
    if rest.tempered_BP is None:
        logits_BP.mul_(((rest_kl_B + rest_ce_B) / rest.sum_1_B)[:, None])
    else:
        logits_BP.mul_((rest_ce_B / rest.sum_1_B)[:, None])
        logits_BP.addcmul_(rest.tempered_BP, (rest_kl_B / rest.sum_T_B)[:, None])

    q_1_BK = cells.q_BK if temperature == 1.0 else (sums.kept_BK - all_1_B[:, None]).exp()
    logits_BP.scatter_(1, columns_BK, rows.ckl_N[:, None] * cells.grad_BK + rows.cce_N[:, None] * q_1_BK)
    logits_BP.scatter_add_(1, label_B1, -rows.cce_N[:, None])
    if slope_BP is not None:
        logits_BP.mul_(slope_BP)
    return cells.value_B, ce_B


def _cap_in_place(logits_BP: Tensor, softcap: float, want_slope: bool) -> Tensor | None:
    """Turn logits into c tanh(logits / c), and return the slope, which is 1 - tanh^2."""
    logits_BP.div_(softcap).tanh_()
    slope_BP = 1 - logits_BP.square() if want_slope else None
    logits_BP.mul_(softcap)
    return slope_BP


class _Rest(NamedTuple):
    sum_T_B: Tensor  # sum of exp((z - largest) / T), at least 1
    sum_1_B: Tensor  # the same at temperature 1
    log_sum_T_B: Tensor  # log of the sum of exp(z / T); -inf where every id is kept
    log_sum_1_B: Tensor  # the same at temperature 1
    tempered_BP: Tensor | None  # exp((z - largest) / T), or None where T is 1 and the block holds it


def _exp_in_place(logits_BP: Tensor, columns_BK: Tensor, vocab_size: int, temperature: float) -> _Rest:
    """Turn the block into exp(z - largest), and sum it but for the columns that are kept."""
    largest_B = logits_BP.amax(-1)
    any_B = largest_B != _NEVER
    shift_B = largest_B.where(any_B, 0.0)
    logits_BP.sub_(shift_B[:, None])
    tempered_BP = None if temperature == 1.0 else logits_BP / temperature

    def summed(distance_BP: Tensor) -> Tensor:
        distance_BP[:, vocab_size:] = _BELOW_ALL
        distance_BP.scatter_(1, columns_BK, _BELOW_ALL)
        return distance_BP.exp_().sum(-1).where(any_B, 0.0)

    sum_1_B = summed(logits_BP)
    sum_T_B = sum_1_B if tempered_BP is None else summed(tempered_BP)
    # the largest term is 1, so clamping changes only an empty sum, which must not divide
    return _Rest(
        sum_T_B.clamp_min(1.0),
        sum_1_B.clamp_min(1.0),
        shift_B / temperature + sum_T_B.log(),
        shift_B + sum_1_B.log(),
        tempered_BP,
    )
