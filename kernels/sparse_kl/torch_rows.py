"""The rows kernel in torch, for any device and dtype.

A CPU processes blocks of rows that fit into its cache. The passes over a block are: maximum, subtract, exp, sum, scale.
A temperature other than 1 adds one exp into a second block, and a softcap adds a block of its slope. All other tensors
are [B, K] or smaller. Padding ids are mapped to a column past the vocabulary, so that no step needs a branch.

Legend: N rows of a chunk, B rows of a block, P columns of the buffer (P > V), V real columns, K ids kept a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.divergence import coarse
from capgap.kernels.sparse_kl.rows import Rows, RowSettings

_BLOCK_ELEMENTS_CPU = 2**19  # 2 MiB of float32, so that the passes over a block stay in the cache
_BLOCK_ELEMENTS = 2**24  # 64 MiB of float32, for few launches and a bounded second block if T is not 1
_NEVER = float("-inf")
# Replaces -inf as an argument of exp, because exp is several times slower on a CPU for -inf and for denormal results.
# The largest term of a sum is 1, so a thousand terms of exp(-64) are below the last bit of float64.
_BELOW_ALL = -64.0


class LogitSums(NamedTuple):
    """The values of a row's logits on which the loss depends.

    Attributes:
        kept_BK: Logits of the kept ids; -inf at padding.
        label_B: Logit of the label.
        rest_T_B: Logsumexp of the other ids' logits / T; -inf if there are no other ids.
        rest_1_B: Logsumexp of the other ids' logits at temperature 1; -inf if there are no other ids.
    """

    kept_BK: Tensor
    label_B: Tensor
    rest_T_B: Tensor
    rest_1_B: Tensor


def torch_rows(logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool) -> tuple[Tensor, Tensor]:
    """Run the rows kernel that `rows.RowsKernel` describes, block by block."""
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
    """Overwrite a block of logits with its gradient, and return each row's divergence [B] and cross-entropy [B], nats.

    Args:
        logits_BP: Logits as in `rows.RowsKernel`, in the dtype of the rows' factors.
        rows: Data of the block's rows.
        settings: Settings of all rows.
        want_gradient: Whether the gradient is needed.
        complete: If the block holds only a part of the vocabulary: turns its sums into those of the whole vocabulary.
            Ids and labels of other parts are then at column V, with their probability.
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

    # each other id gets its share of its cell's gradient; this block may hold only a part of the cell's ids
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
    """Turn logits into c tanh(logits / c), and return the slope 1 - tanh^2 if it is wanted."""
    logits_BP.div_(softcap).tanh_()
    slope_BP = 1 - logits_BP.square() if want_slope else None
    logits_BP.mul_(softcap)
    return slope_BP


class _Rest(NamedTuple):
    sum_T_B: Tensor  # sum of exp((z - largest) / T), at least 1
    sum_1_B: Tensor  # the same at temperature 1
    log_sum_T_B: Tensor  # log of the sum of exp(z / T); -inf if every id is kept
    log_sum_1_B: Tensor  # the same at temperature 1
    tempered_BP: Tensor | None  # exp((z - largest) / T); None if T is 1, because the block itself holds it


def _exp_in_place(logits_BP: Tensor, columns_BK: Tensor, vocab_size: int, temperature: float) -> _Rest:
    """Turn the block into exp(z - largest), and sum all columns but the kept ones."""
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
    # the largest term of a sum is 1, so clamping changes only empty sums, and the caller never divides by 0
    return _Rest(
        sum_T_B.clamp_min(1.0),
        sum_1_B.clamp_min(1.0),
        shift_B / temperature + sum_T_B.log(),
        shift_B + sum_1_B.log(),
        tempered_BP,
    )
