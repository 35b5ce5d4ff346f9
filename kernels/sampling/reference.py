"""Reference implementations in plain float64, against which the fast ones are tested; their results are float64 too.

Legend: N rows, V vocabulary, K ids kept, T further temperatures, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capgap.kernels.sampling.rows import SampledRows, TopkRows, check_num_kept, check_powers, check_rows, check_samples


def topk_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    powers: Sequence[float] = (),
) -> TopkRows:
    """Return the `top_k` most probable tokens of softmax(logits / temperature), by a full sort.

    Raises:
        ValueError: Shapes, dtypes or settings do not fit together.
    """
    check_rows(logits_NV, labels_N, temperature, vocab_size)
    logprobs_NV = torch.log_softmax(logits_NV[:, :vocab_size].double() / temperature, -1)
    check_num_kept(top_k, logprobs_NV.shape[1])
    check_powers(powers)
    sorted_NV, ids_NV = logprobs_NV.sort(dim=-1, descending=True)
    return TopkRows(
        ids_NV[:, :top_k].to(torch.int32),
        sorted_NV[:, :top_k],
        sorted_NV[:, top_k:].exp().sum(-1),
        _at_label(logprobs_NV, labels_N),
        torch.stack(
            [torch.logsumexp(sorted_NV[:, top_k:] * power, -1) for power in powers]
            or [sorted_NV.new_empty(len(sorted_NV))],
            dim=1,
        )[:, : len(powers)],
    )


def sampled_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    offsets_N: Tensor,
    num_samples: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> SampledRows:
    """Return `num_samples` systematic samples from softmax(logits / temperature), by the full cumulative distribution.

    Raises:
        ValueError: Shapes, dtypes or settings do not fit together.
    """
    check_rows(logits_NV, labels_N, temperature, vocab_size)
    check_samples(offsets_N, num_samples, logits_NV)
    logprobs_NV = torch.log_softmax(logits_NV[:, :vocab_size].double() / temperature, -1)
    ends_NV = logprobs_NV.exp().cumsum(-1)
    steps_n = torch.arange(num_samples, dtype=torch.float64, device=logits_NV.device)
    points_Nn = (steps_n + offsets_N.double()[:, None]) / num_samples * ends_NV[:, -1:]
    samples_Nn = torch.searchsorted(ends_NV, points_Nn, right=True)
    return SampledRows(samples_Nn.to(torch.int32), _at_label(logprobs_NV, labels_N), logprobs_NV.amax(-1))


def _at_label(logprobs_NV: Tensor, labels_N: Tensor) -> Tensor:
    at_label = [
        row_V[label] if 0 <= label < len(row_V) else row_V.new_tensor(float("-inf"))
        for row_V, label in zip(logprobs_NV, labels_N.tolist(), strict=True)
    ]
    return torch.stack(at_label) if at_label else logprobs_NV.new_zeros(0)
