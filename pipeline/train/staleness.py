"""Measures how far a student has moved away from the one that wrote the text it learns from, by importance ratios.

student's probability of each token over the writer's --> mean, quantiles, share outside a clip, effective sample size

Legend: N tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from capgap.kernels.sparse_kl import importance_ratio
from capgap.schemas.run_train import USUAL_CLIP

_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class RatioFigures:
    """Figures of a text's importance ratios, which are all 1 as long as the student has not changed since writing it.

    Attributes:
        mean: The mean ratio. Its expectation is 1 for any student, so its distance from 1 shows the sampling error of
            all these figures.
        p5: The 5th percentile.
        median: The median.
        p95: The 95th percentile.
        outside: The share of tokens whose ratio differs from 1 by more than the clip, in [0, 1].
        effective: The effective sample size over the number of tokens, (sum of ratios)^2 / (N sum of squares), in
            (0, 1]: how many tokens of the student's own would give as exact a mean as one of these, weighted by ratio.
    """

    mean: float
    p5: float
    median: float
    p95: float
    outside: float
    effective: float

    def rounded(self) -> dict[str, float]:
        """Return the figures, rounded to 6 digits, by their columns in metrics.csv."""
        return {f"ratio_{name}": round(value, 6) for name, value in asdict(self).items()}


def ratio_figures(logprobs_N: Tensor, writer_N: Tensor, clip: float = USUAL_CLIP) -> RatioFigures:
    """Compute the figures of a text with at least one token.

    Args:
        logprobs_N: The student's logprob of each token, in nats.
        writer_N: The writer's logprob of each token, in nats.
        clip: The difference from 1 above which a ratio counts as outside.
    """
    ratio_N = importance_ratio(logprobs_N.double(), writer_N.double())
    low, middle, high = torch.quantile(ratio_N, torch.tensor(_QUANTILES, dtype=ratio_N.dtype).to(ratio_N.device))
    effective = ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum())
    figures = torch.stack([ratio_N.mean(), low, middle, high, ((ratio_N - 1).abs() > clip).double().mean(), effective])
    return RatioFigures(*figures.tolist())
