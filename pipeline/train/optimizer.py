"""AdamW and its learning rate: linear warm-up, then cosine decay or a plateau with a short decay at its end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from capgap.schemas.run_optimization import OptimizationSettings


def optimizer_and_schedule(
    parameters: Iterable[nn.Parameter], settings: OptimizationSettings, num_steps: int
) -> dict[str, Any]:
    """Fused AdamW over the parameters that are trained, as Lightning takes it; its rate moves every optimizer step."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(settings, step, num_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(settings: OptimizationSettings, step: int, num_steps: int) -> float:
    """The learning rate of a step over its peak.

    `wsd` is that of MiniCPM (arXiv 2404.06395): warm-up, stable, decay. Its `exponential` decay is that paper's, `sqrt`
    the one that Haegele et al. found best (arXiv 2405.18392).
    """
    warmup, last, low = settings.warmup_fraction * num_steps, num_steps - 1, settings.final_learning_rate_ratio
    if step >= last > 0:
        # also where a decay has less than a step, or the warm-up leaves it none
        return low
    if step < warmup:
        return (step + 1) / (warmup + 1)
    is_wsd = settings.schedule == "wsd"
    start = num_steps * (1 - settings.decay_share) if is_wsd else warmup
    if step < start:
        return 1.0
    # a training of one step has the peak
    done = (step - start) / (last - start) if last else min(step, 1.0)
    if not is_wsd:
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.decay == "exponential":
        return math.pow(low, done)
    return low + (1 - low) * (1 - (math.sqrt(done) if settings.decay == "sqrt" else done))
