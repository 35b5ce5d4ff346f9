"""Held-out text, measured while a training runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
import torch

from capgap.pipeline.store import Batch
from capgap.pipeline.train.metrics import MetricsFile
from capgap.pipeline.train.module import DistillationModule


class HeldOut(lightning.Callback):
    """Measures the cross-entropy of held-out text every few steps and at the end.

    Attributes:
        measured: step and loss of the last measurement; the same on every rank.
    """

    def __init__(self, file: MetricsFile, batches: Iterable[Batch], every_steps: int, tokens_per_step: int) -> None:
        self._file, self._batches = file, list(batches)
        self._every, self._tokens_per_step, self._last_step = every_steps, tokens_per_step, 0
        self.measured: tuple[int, float] | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """The step that a resumed training begins with has been measured."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Measure at the interval and at the last step."""
        step = trainer.global_step
        if step == self._last_step or (step % self._every and step != trainer.max_steps):
            return
        self._last_step = step
        loss = heldout_loss(module, self._batches)
        self.measured = (step, loss)
        self._file.add(step=step, num_tokens=step * self._tokens_per_step, validation_loss=round(loss, 6))


@torch.no_grad()
def heldout_loss(module: DistillationModule, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy over all labels of the batches, nats per token."""
    was_training = module.training
    module.eval()
    total, count = 0.0, 0
    for batch in batches:
        on_device = batch.to(module.device)
        rows_N = module.loss(on_device, alpha=0.0).ce_N
        counted_N = on_device.labels_BL.flatten() >= 0
        total += float(rows_N[counted_N].double().sum())
        count += int(counted_N.sum())
    module.train(was_training)
    return total / max(count, 1)
