"""The binary divergence of chunk likelihoods under the teacher and the student, for spans that both tokenizers share.

    teacher's logprob of a chunk, student's sum of its tokens' logprobs --> divergence of (p, 1 - p) and (q, 1 - q)

At temperature T, both likelihoods are raised to the power 1 / T first, and the divergence is multiplied by T. A chunk
of many nats has a likelihood near 0 under both models, but the root of its likelihood is not near 0. For large T, the
product tends to a loss of the two logprobs alone. (Approximate likelihood matching: arXiv 2503.20083.)

Legend: N rows (tokens), C chunks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ChunkDivergence = Literal["forward_kl", "reverse_kl"]

# Logprobs are at most minus this, so that the log of the remaining probability, and its slope, stay finite.
_LEAST_DOUBT = 1e-7


def chunk_sums(logprobs_N: Tensor, left_N: Tensor) -> Tensor:
    """Return the sum of each chunk's logprobs, in the chunk's last row [N]; 0 in all other rows.

    On a GPU, the order of a sum of three or more logprobs is open, so that its last bit may differ from call to call.

    Args:
        logprobs_N: Logprob of each row's label, nats.
        left_N: How many rows of the same chunk follow each row, int64; -1 outside of chunks.
    """
    in_chunk_N = left_N >= 0
    places_N = torch.arange(len(left_N), device=left_N.device)
    last_N = (places_N + left_N).where(in_chunk_N, places_N)
    return torch.zeros_like(logprobs_N).index_add(0, last_N, logprobs_N.where(in_chunk_N, 0.0))


def chunk_kl(
    teacher_C: Tensor, student_C: Tensor, temperature: float = 1.0, divergence: ChunkDivergence = "forward_kl"
) -> Tensor:
    """Return T times the divergence over two outcomes, the chunk and anything else, of each chunk [C], in nats.

    Args:
        teacher_C: The teacher's logprobs, nats; no gradient flows to them.
        student_C: The student's logprobs, nats.
        temperature: T.
        divergence: `forward_kl`, KL(teacher || student), or `reverse_kl`, KL(student || teacher).

    Raises:
        ValueError: The temperature is not a finite number above 0.
    """
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature: got {temperature}, expected a finite number above 0")
    one_C, other_C = teacher_C.detach().to(student_C.dtype) / temperature, student_C / temperature
    if divergence == "reverse_kl":
        one_C, other_C = other_C, one_C
    one_C, other_C = one_C.clamp_max(-_LEAST_DOUBT), other_C.clamp_max(-_LEAST_DOUBT)
    p_C = one_C.exp()
    rest_C = -torch.expm1(one_C)
    found_C: Tensor = p_C * (one_C - other_C) + rest_C * (_log_rest(one_C) - _log_rest(other_C))
    return temperature * found_C


def _log_rest(logprobs_C: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x below 0."""
    return torch.log(-torch.expm1(logprobs_C))
