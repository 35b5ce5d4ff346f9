"""The divergences between teacher and student, as functions of the K + 1 log-probabilities of the coarse softmax.

README.md derives the gradients. Legend: B rows, K kept ids a row.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
"""KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence."""

Tail = Literal["drop", "renorm", "ghost", "label"]
"""The treatment of the teacher's probability outside the kept ids: `drop` leaves it out, `renorm` scales the kept ids
to sum to 1, `ghost` makes it a cell of its own, `label` adds it to the real next token."""

Recording = Literal["topk", "sampled"]
"""Whether targets are the teacher's top-k tokens or samples from the teacher."""

LOWEST_LOGPROB = -30.0
"""The reverse KL raises lower logprobs of the teacher to this value, because it would be infinite at probability 0."""

_TAILS: dict[tuple[Recording, Divergence], tuple[Tail, ...]] = {
    ("topk", "forward_kl"): ("drop", "renorm", "ghost", "label"),
    ("topk", "reverse_kl"): ("ghost",),
    ("topk", "jsd"): ("renorm", "ghost", "label"),
    ("sampled", "forward_kl"): ("drop", "renorm"),
}

_REASONS: dict[tuple[Recording, Divergence], str] = {
    ("topk", "reverse_kl"): "otherwise the teacher has probability 0 outside the kept ids, and the KL is unbounded",
    ("topk", "jsd"): "without its tail a target is no distribution",
    ("sampled", "forward_kl"): "samples have no tail",
}


def check_pair(recording: Recording, divergence: Divergence, tail: Tail) -> None:
    """Raise ValueError, with the reason, if the divergence is undefined or biased on such targets."""
    if (recording, divergence) not in _TAILS:
        if recording == "sampled" and divergence in ("reverse_kl", "jsd"):
            raise ValueError(
                f"divergence: got {divergence} on sampled targets, expected forward_kl; frequencies of samples are "
                "unbiased for the teacher's probabilities, and only the forward KL's gradient is linear in them"
            )
        raise ValueError(
            f"recording, divergence: got {recording!r}, {divergence!r}, expected topk or sampled, "
            "and forward_kl, reverse_kl or jsd"
        )
    allowed = _TAILS[recording, divergence]
    if tail not in allowed:
        why = _REASONS.get((recording, divergence), "there are no others")
        raise ValueError(
            f"tail: got {tail!r} with {divergence} on {recording} targets, expected {' or '.join(allowed)}; {why}"
        )


class Coarse(NamedTuple):
    """A divergence of K + 1 cells and its gradient with respect to the K + 1 logits of the student's softmax.

    Attributes:
        value_B: The divergence [B], nats.
        grad_BK: Gradient with respect to the kept ids' logits [B, K]; 0 in places without a cell.
        grad_tail_B: Gradient with respect to the logsumexp of all other ids' logits [B].
        q_BK: The student's probabilities of the kept ids [B, K]; 0 in places without a cell.
    """

    value_B: Tensor
    grad_BK: Tensor
    grad_tail_B: Tensor
    q_BK: Tensor


def coarse(
    logq_BK: Tensor, logq_tail_B: Tensor, p_BK: Tensor, p_tail_B: Tensor, divergence: Divergence, beta: float
) -> Coarse:
    """Compute the divergence between teacher p and student q over the cells, and its gradient.

    Args:
        logq_BK: The student's log-probabilities of the kept ids; read only where `p_BK` is above 0.
        logq_tail_B: The student's log-probability of all other ids; -inf if there are none, and then no such cell.
        p_BK: The teacher's probabilities of the kept ids; 0 means that the place has no cell.
        p_tail_B: The teacher's probability of all other ids.
        divergence: Name of the divergence.
        beta: Weight of KL(teacher || mixture) in `jsd`; the mixture is `beta p + (1 - beta) q`.
    """
    cell_BK, cell_tail_B = p_BK > 0, logq_tail_B != float("-inf")
    logq_BK = logq_BK.where(cell_BK, 0.0)
    logq_tail_B, p_tail_B = logq_tail_B.where(cell_tail_B, 0.0), p_tail_B.where(cell_tail_B, 0.0)
    q_BK, q_tail_B = logq_BK.exp().where(cell_BK, 0.0), logq_tail_B.exp().where(cell_tail_B, 0.0)
    if divergence == "forward_kl":
        value_B = (torch.xlogy(p_BK, p_BK) - p_BK * logq_BK).sum(-1)
        value_B = value_B + torch.xlogy(p_tail_B, p_tail_B) - p_tail_B * logq_tail_B
        mass_B = p_BK.sum(-1) + p_tail_B
        return Coarse(value_B, q_BK * mass_B[:, None] - p_BK, q_tail_B * mass_B - p_tail_B, q_BK)
    slope = _reverse_slope if divergence == "reverse_kl" else _jsd_slope
    share_BK, slope_BK = slope(logq_BK, p_BK, beta)
    share_tail_B, slope_tail_B = slope(logq_tail_B, p_tail_B, beta)
    slope_BK, slope_tail_B = slope_BK.where(q_BK > 0, 0.0), slope_tail_B.where(q_tail_B > 0, 0.0)
    mean_B = (q_BK * slope_BK).sum(-1) + q_tail_B * slope_tail_B
    value_B = mean_B + share_BK.where(cell_BK, 0.0).sum(-1) + share_tail_B.where(cell_tail_B, 0.0)
    return Coarse(value_B, q_BK * (slope_BK - mean_B[:, None]), q_tail_B * (slope_tail_B - mean_B), q_BK)


def _reverse_slope(logq: Tensor, p: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """Return the value's part without a factor q, which is 0, and log(q / p), whose mean under q is the value."""
    return torch.zeros_like(logq), logq - p.log().clamp_min(LOWEST_LOGPROB)


def _jsd_slope(logq: Tensor, p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return beta p log(p / m), and (1 - beta) log(q / m), which is also the derivative of the divergence by q."""
    logp = p.log()
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    return (beta * p * (logp - logm)).where(p > 0, 0.0), (1 - beta) * (logq - logm)
