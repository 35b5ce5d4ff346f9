"""The policy-gradient form of the reverse KL for text that a student wrote; it needs one logprob a token.

    each token: logprobs under the student, the teacher and the writer --> ratio x advantage, clipped, and its gradient

The writer is the student as it was when it wrote the text. Let y be sampled from the writer w, let q be the student now
and p the teacher. The gradient of KL(q || p) at a position is E_w[(q / w)(y) (log q - log p)(y) d log q(y)]. So the
loss of a token is minus its ratio q / w times its advantage log p - log q, through which no gradient flows. If the
student has moved far from the writer, the ratios of a few samples are unreliable. They are clipped as in PPO (arXiv
1707.06347): a token has no gradient once its ratio has left [1 - clip, 1 + clip] in the direction of its advantage.

Legend: N rows (tokens).
"""

from __future__ import annotations

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.divergence import LOWEST_LOGPROB

# Ratios are cut off at exp(20), whose square is still finite in float32.
_MOST_NATS = 20.0


def policy_gradient(logprobs_N: Tensor, teacher_N: Tensor, writer_N: Tensor, clip: float) -> Tensor:
    """Return the loss of each token [N], whose gradient is that of the reverse KL; its value is no divergence.

    Args:
        logprobs_N: The student's logprob of each label, nats; the gradient flows to it.
        teacher_N: The teacher's logprob of each label, nats; it is raised to -30 if it is lower.
        writer_N: The logprob of each label under the student that wrote the text, nats.
        clip: Largest distance of a ratio from 1.

    Raises:
        ValueError: `clip` is not a finite number above 0.
    """
    if not 0.0 < clip < float("inf"):
        raise ValueError(f"clip: got {clip}, expected a finite number above 0")
    ratio_N = importance_ratio(logprobs_N, writer_N)
    advantage_N = teacher_N.clamp_min(LOWEST_LOGPROB) - logprobs_N.detach()
    clipped_N = ratio_N.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)


def importance_ratio(logprobs_N: Tensor, writer_N: Tensor) -> Tensor:
    """Return the student's probability of each token divided by the writer's [N], at most exp(20)."""
    return (logprobs_N - writer_N).clamp_max(_MOST_NATS).exp()
