"""How far a student has gone from the one that wrote the text it learns from: its importance ratios there.

of each token: the student's probability now over the writer's --> mean, quantiles, share outside a clip, samples left

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
    """The ratios of a text's tokens; all are 1 as long as the student is the one that wrote it.

    Attributes:
        mean: 1 in expectation, whatever the student: how far it is from 1 shows how few tokens the rest is known of.
        p5: a twentieth of the tokens has a lower ratio.
        median: half of them has.
        p95: a twentieth has a higher one.
        outside: share farther from 1 than the clip.
        effective: effective sample size over the number of tokens, (sum of ratios)^2 / (N sum of squares): what they
            are worth, weighted by their ratios, beside as many of the student's own.
    """

    mean: float
    p5: float
    median: float
    p95: float
    outside: float
    effective: float

    def rounded(self) -> dict[str, float]:
        """By the columns of metrics.csv."""
        return {f"ratio_{name}": round(value, 6) for name, value in asdict(self).items()}


def ratio_figures(logprobs_N: Tensor, writer_N: Tensor, clip: float = USUAL_CLIP) -> RatioFigures:
    """The figures of at least one token.

    Args:
        logprobs_N: the student's, nats.
        writer_N: the writer's.
        clip: how far from 1 is outside.
    """
    ratio_N = importance_ratio(logprobs_N.double(), writer_N.double())
    low, middle, high = torch.quantile(ratio_N, torch.tensor(_QUANTILES, dtype=ratio_N.dtype).to(ratio_N.device))
    effective = ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum())
    figures = torch.stack([ratio_N.mean(), low, middle, high, ((ratio_N - 1).abs() > clip).double().mean(), effective])
    return RatioFigures(*figures.tolist())
