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
    """Return fused AdamW over the trainable parameters and its learning rate schedule, in the form Lightning expects.

    Matrices have weight decay, and vectors have none. The learning rate moves at every optimizer step.

    Args:
        parameters: The parameters of the model, including frozen ones.
        settings: The settings of the optimization.
        num_steps: Number of optimizer steps in the whole training.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(settings, step, num_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(settings: OptimizationSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step as a fraction of its peak.

    `wsd` is the schedule of MiniCPM (arXiv 2404.06395): warm-up, stable, decay. The `exponential` decay comes from that
    paper, and `sqrt` is the decay that Haegele et al. found best (arXiv 2405.18392).

    Args:
        settings: The settings of the optimization.
        step: Number of the step, counted from 0.
        num_steps: Number of optimizer steps in the whole training.
    """
    warmup, last, low = settings.warmup_fraction * num_steps, num_steps - 1, settings.final_learning_rate_ratio
    if step >= last > 0:
        # This also holds if the decay is shorter than a step, or the warm-up leaves no step for it.
        return low
    if step < warmup:
        return (step + 1) / (warmup + 1)
    is_wsd = settings.schedule == "wsd"
    start = num_steps * (1 - settings.decay_share) if is_wsd else warmup
    if step < start:
        return 1.0
    # A training of a single step uses the peak.
    done = (step - start) / (last - start) if last else min(step, 1.0)
    if not is_wsd:
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.decay == "exponential":
        return math.pow(low, done)
    return low + (1 - low) * (1 - (math.sqrt(done) if settings.decay == "sqrt" else done))
