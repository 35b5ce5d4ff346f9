"""One block of rows: logits in, their gradient out in the same memory, with each row's KL and cross-entropy.

The softmax is a coarse one over K + 1 cells: the kept ids and one tail of all the others. README.md derives it. The
block holds at least one column more than the vocabulary: padding ids are sent there, so that no step needs a branch.
Passes over the block: largest, subtract, exp, sum, scale; at a temperature other than 1 one more exp into a second
block. Everything else is [B, K] or smaller.

Legend: B rows of a block, P columns of the buffer (P > V), V real columns, K ids kept a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_NEVER = float("-inf")


class Rows(NamedTuple):
    """The rows of a block beside their logits, on the logits' device, scales and weights in the logits' dtype.

    Attributes:
        ids_BK: kept ids, int64; outside [0, V) is padding.
        weights_BK: the teacher's probabilities; 0 is padding.
        tail_B: the teacher's probability of all other ids, or None.
        labels_B: real next tokens, int64, all within [0, V).
        kl_scale_B: factor of the gradient of KL with respect to logits / T.
        ce_scale_B: factor of the gradient of the cross-entropy.
    """

    ids_BK: Tensor
    weights_BK: Tensor
    tail_B: Tensor | None
    labels_B: Tensor
    kl_scale_B: Tensor
    ce_scale_B: Tensor

    def part(self, rows: slice | Tensor) -> Rows:
        """The rows of a slice or of an index."""
        return Rows(*(None if field is None else field[rows] for field in self))  # type: ignore[arg-type]


def gradient_in_place(
    logits_BP: Tensor, vocab_size: int, rows: Rows, temperature: float, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """KL [B] and cross-entropy [B] in nats; `logits_BP` becomes the gradient, 0 in columns past the vocabulary.

    Without `want_gradient` the block is scratch afterwards.
    """
    logits_BP[:, vocab_size:] = _NEVER
    label_B1 = rows.labels_B[:, None]
    label_logit_B = logits_BP.gather(1, label_B1)[:, 0]
    kept = _take_kept(logits_BP, vocab_size, rows)

    rest = _exp_in_place(logits_BP, temperature)
    tempered = temperature != 1.0
    log_kept_B = torch.logsumexp(kept.logits_BK / temperature, -1)
    log_all_B = torch.logaddexp(rest.log_sum_T_B, log_kept_B)
    log_all_1_B = log_all_B
    if tempered:
        log_all_1_B = torch.logaddexp(rest.log_sum_1_B, torch.logsumexp(kept.logits_BK, -1))
    logq_BK = kept.logits_BK / temperature - log_all_B[:, None]
    logq_tail_B = rest.log_sum_T_B - log_all_B

    tail_B = torch.zeros_like(log_all_B)
    if rows.tail_B is not None:  # where every id is kept there is no column for a tail
        tail_B = rows.tail_B.clamp_min(0).where(rest.log_sum_T_B > _NEVER, 0.0)
    kl_B = (torch.xlogy(kept.mass_BK, kept.mass_BK) - kept.mass_BK * logq_BK).where(kept.distinct_BK, 0.0).sum(-1)
    kl_B += (torch.xlogy(tail_B, tail_B) - tail_B * logq_tail_B).where(tail_B > 0, 0.0)
    ce_B = log_all_1_B - label_logit_B
    if not want_gradient:
        return kl_B, ce_B

    total_B = kept.mass_BK.sum(-1) + tail_B
    q_BK, q_tail_B = logq_BK.exp(), logq_tail_B.exp()
    q_1_BK, q_tail_1_B = q_BK, q_tail_B
    if tempered:
        q_1_BK = (kept.logits_BK - log_all_1_B[:, None]).exp()
        q_tail_1_B = (rest.log_sum_1_B - log_all_1_B).exp()
    rest_kl_B = rows.kl_scale_B * (q_tail_B * total_B - tail_B)
    rest_ce_B = rows.ce_scale_B * q_tail_1_B
    if rest.tempered_BP is None:
        logits_BP.mul_(((rest_kl_B + rest_ce_B) / rest.sum_1_B)[:, None])
    else:
        logits_BP.mul_((rest_ce_B / rest.sum_1_B)[:, None])
        logits_BP.addcmul_(rest.tempered_BP, (rest_kl_B / rest.sum_T_B)[:, None])

    kept_BK = rows.kl_scale_B[:, None] * (q_BK * total_B[:, None] - kept.mass_BK) + rows.ce_scale_B[:, None] * q_1_BK
    logits_BP.scatter_(1, kept.columns_BK, kept_BK)
    logits_BP.scatter_add_(1, label_B1, -rows.ce_scale_B[:, None])
    return kl_B, ce_B


class _Kept(NamedTuple):
    columns_BK: Tensor  # the id, once a row: column V stands for padding and for all but one of an id's repeats
    distinct_BK: Tensor  # whether the entry stands for its id
    mass_BK: Tensor  # the teacher's probability of the id, repeats added; 0 where not distinct
    logits_BK: Tensor  # the student's logit of the id; -inf where not distinct


def _take_kept(logits_BP: Tensor, vocab_size: int, rows: Rows) -> _Kept:
    """Lift the kept ids out of the block, leaving -inf, so that a pass over it sees the other ids only.

    Repeats are found without a sort: every entry writes its position into its id's column, and the one that is read
    back stands for the id.
    """
    valid_BK = (rows.weights_BK > 0) & (rows.ids_BK >= 0) & (rows.ids_BK < vocab_size)
    columns_BK = rows.ids_BK.where(valid_BK, vocab_size)
    logits_BK = logits_BP.gather(1, columns_BK)
    position_BK = torch.arange(columns_BK.shape[1], device=columns_BK.device).expand_as(columns_BK)
    logits_BP.scatter_(1, columns_BK, position_BK.to(logits_BP.dtype))
    winner_BK = logits_BP.gather(1, columns_BK).long()
    logits_BP.scatter_(1, columns_BK, _NEVER)

    distinct_BK = valid_BK & (winner_BK == position_BK)
    mass_BK = torch.zeros_like(logits_BK).scatter_add_(1, winner_BK, rows.weights_BK)
    return _Kept(
        columns_BK.where(distinct_BK, vocab_size),
        distinct_BK,
        mass_BK.where(distinct_BK, 0.0),
        logits_BK.where(distinct_BK, _NEVER),
    )


class _Rest(NamedTuple):
    sum_T_B: Tensor  # sum of exp((z - largest) / T), at least 1
    sum_1_B: Tensor  # the same at temperature 1
    log_sum_T_B: Tensor  # log of the sum of exp(z / T); -inf where every id is kept
    log_sum_1_B: Tensor  # the same at temperature 1
    tempered_BP: Tensor | None  # exp((z - largest) / T), or None where T is 1 and the block holds it


def _exp_in_place(logits_BP: Tensor, temperature: float) -> _Rest:
    """Turn the block into exp(z - largest), and sum it."""
    largest_B = logits_BP.amax(-1)
    shift_B = largest_B.where(largest_B > _NEVER, 0.0)
    logits_BP.sub_(shift_B[:, None])
    tempered_BP = None if temperature == 1.0 else (logits_BP / temperature).exp_()
    sum_1_B = logits_BP.exp_().sum(-1)
    sum_T_B = sum_1_B if tempered_BP is None else tempered_BP.sum(-1)
    # the largest term is 1, so clamping changes only an empty sum, which must not divide
    return _Rest(
        sum_T_B.clamp_min(1.0),
        sum_1_B.clamp_min(1.0),
        shift_B / temperature + sum_T_B.log(),
        shift_B + sum_1_B.log(),
        tempered_BP,
    )
