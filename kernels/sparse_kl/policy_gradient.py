"""The policy-gradient form of the reverse KL, from one logprob a token: of text that a student wrote.

    of each token: the student's logprob now, the teacher's, the writer's --> ratio x advantage, clipped, with its slope

The writer is the student as it was. With y sampled from the writer w, the student now q and the teacher p, the slope
of KL(q || p) at a position is E_w[(q / w)(y) (log q - log p)(y) d log q(y)]: so the loss of a token is minus its ratio
q / w times its advantage, log p - log q, in which nothing flows. Far from the writer a ratio says little of a few
samples: clipped as in PPO (arXiv 1707.06347), a token whose ratio left [1 - clip, 1 + clip] in the direction that its
advantage asks for has no slope any more.

Legend: N rows (tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.divergence import LOWEST_LOGPROB

# A ratio beyond exp(20) is cut off: its square is still finite in float32.
_MOST_NATS = 20.0


def policy_gradient(logprobs_N: Tensor, teacher_N: Tensor, writer_N: Tensor, clip: float) -> Tensor:
    """The loss of each token [N], whose slope is that of the reverse KL; its value is no distance.

    Args:
        logprobs_N: the student's of each label; what the loss flows to.
        teacher_N: the teacher's; below -30 it counts as -30, as in `linear_sparse_kl`.
        writer_N: those of the student that wrote the text.
        clip: how far from 1 a ratio may be.

    Raises:
        ValueError: the clip is not above 0.
    """
    if not 0.0 < clip < float("inf"):
        raise ValueError(f"clip: got {clip}, expected a finite number above 0")
    ratio_N = importance_ratio(logprobs_N, writer_N)
    advantage_N = teacher_N.clamp_min(LOWEST_LOGPROB) - logprobs_N.detach()
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)


def importance_ratio(logprobs_N: Tensor, writer_N: Tensor) -> Tensor:
    """The student's probability of each token over the writer's [N], exp(20) at most."""
    return (logprobs_N - writer_N).clamp_max(_MOST_NATS).exp()
