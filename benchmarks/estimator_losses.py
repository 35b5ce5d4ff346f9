"""Estimators and losses that are tried beside capgap's own, in plain torch with all logits in memory.

Every one takes the student's and the teacher's logprobs of a micro-batch of whole sequences and gives the mean loss of
its rows. `TARGETS` are the estimators of the teacher's distribution: [N, V] weights, of which few are not 0.

Legend: N rows, L rows of a sequence, B = N / L sequences, V vocabulary, K top tokens, n samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# found beside this file also where Python is told not to look there: -P, PYTHONSAFEPATH
sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import Tensor

Targets = Callable[[Tensor, torch.Generator], Tensor]
Loss = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]

NUM_SAMPLES = 50


def systematic(p_NV: Tensor, generator: torch.Generator, num_samples: int = NUM_SAMPLES) -> Tensor:
    """Counts over n of systematic samples, as a cache keeps them."""
    return _points(p_NV.double(), generator, num_samples).to(p_NV.dtype) / num_samples


def threshold(p_NV: Tensor, generator: torch.Generator, num_samples: int = NUM_SAMPLES) -> Tensor:
    """Tokens of at least 1 / n exactly, each of the others with probability n p and then as 1 / n.

    The expected number of distinct tokens is that of `systematic`, sum min(1, n p). The weights sum to 1 up to 1 / n.
    """
    is_head_NV = p_NV >= 1 / num_samples
    tail_NV = p_NV.masked_fill(is_head_NV, 0)
    counts_NV = _points(tail_NV.double(), generator, num_samples).to(p_NV.dtype)
    return torch.where(is_head_NV, p_NV, counts_NV / num_samples)


def threshold_whole(p_NV: Tensor, generator: torch.Generator, num_samples: int = NUM_SAMPLES) -> Tensor:
    """As `threshold`, but the samples of the tail, one at least, share its mass evenly: the weights sum to 1."""
    is_head_NV = p_NV >= 1 / num_samples
    tail_NV = p_NV.masked_fill(is_head_NV, 0).double()
    tail_N1 = tail_NV.sum(-1, keepdim=True)
    wanted_N1 = (num_samples * tail_N1).round().clamp_min(1)
    counts_NV = _points(tail_NV * (wanted_N1 / num_samples / tail_N1.clamp_min(1e-30)), generator, num_samples)
    taken_N1 = counts_NV.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(is_head_NV, p_NV, (counts_NV * tail_N1 / taken_N1).to(p_NV.dtype))


TARGETS: dict[str, Targets] = {
    "systematic": systematic,
    "threshold": threshold,
    "threshold, tail's mass exact": threshold_whole,
}


def whole_kl(logq_NV: Tensor, logp_NV: Tensor, seq_len: int, generator: torch.Generator) -> Tensor:
    """The KL over the whole vocabulary."""
    return _kl(logq_NV, logp_NV).mean()


def cross_entropy_with_targets(
    logq_NV: Tensor, logp_NV: Tensor, seq_len: int, generator: torch.Generator, *, targets: Targets
) -> Tensor:
    """What a student learns from weights: the KL but for the teacher's own entropy, which has no gradient."""
    return -(targets(logp_NV.exp(), generator) * logq_NV).sum(-1).mean()


def student_entropy(
    logq_NV: Tensor, logp_NV: Tensor, seq_len: int, generator: torch.Generator, *, targets: Targets
) -> Tensor:
    """As `cross_entropy_with_targets`, each row weighted by the entropy of the student's own distribution."""
    weights_N = torch.special.entr(logq_NV.detach().exp()).sum(-1)
    rows_N = -(targets(logp_NV.exp(), generator) * logq_NV).sum(-1)
    return (weights_N * rows_N).sum() / weights_N.sum()


def tail_aware(
    logq_NV: Tensor,
    logp_NV: Tensor,
    seq_len: int,
    generator: torch.Generator,
    *,
    top_k: int = 10,
    beta: float = 2.0,
) -> Tensor:
    """The divergence of arXiv:2602.20816: KL = KL1 + a KL2, its second term times beta over the sequence's mean a.

    KL1 is over the K top tokens and the rest as one, a the teacher's rest, KL2 between the two rests, made to sum to 1.
    """
    ids_NK = logp_NV.topk(top_k, dim=-1).indices
    logp_NC, logq_NC = (_with_rest(one_NV, ids_NK) for one_NV in (logp_NV, logq_NV))
    first_N = _kl(logq_NC, logp_NC)
    rest_N = logp_NC[:, -1].exp()
    mean_N = rest_N.view(-1, seq_len).mean(1, keepdim=True).expand(-1, seq_len).flatten()
    return (first_N + beta / mean_N * (_kl(logq_NV, logp_NV) - first_N)).mean()


LOSSES: dict[str, Loss] = {
    "whole vocabulary": whole_kl,
    "sampled": partial(cross_entropy_with_targets, targets=systematic),
    "sampled, student entropy": partial(student_entropy, targets=systematic),
    "whole vocabulary, tail-aware": tail_aware,
}
# What each is paired with: the same but for what is tried.
PLAIN = {
    "sampled, student entropy": "sampled",
    "whole vocabulary, tail-aware": "whole vocabulary",
}


def _points(mass_NV: Tensor, generator: torch.Generator, num_samples: int) -> Tensor:
    """How many of the points (j + r) / n fall to each token, r one number a row; float64 [N, V]."""
    ends_NV = mass_NV.cumsum(-1) * num_samples
    passed_NV = (ends_NV - torch.rand((len(mass_NV), 1), generator=generator, dtype=torch.float64)).ceil().clamp_min(0)
    return passed_NV.diff(dim=-1, prepend=passed_NV.new_zeros((len(mass_NV), 1)))


def _with_rest(logs_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The logprobs of these tokens, and that of all others together in the last column."""
    others_NV = logs_NV.scatter(1, ids_NK, float("-inf"))
    return torch.cat([logs_NV.gather(1, ids_NK), others_NV.logsumexp(-1, keepdim=True)], 1)


def _kl(logq_NC: Tensor, logp_NC: Tensor) -> Tensor:
    kl_N: Tensor = (logp_NC.exp() * (logp_NC - logq_NC)).sum(-1)
    return kl_N
