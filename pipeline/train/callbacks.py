"""What happens beside the steps, one concern each: metrics, held-out loss, checkpoints, progress."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import torch

from capgap.pipeline.progress import Meter
from capgap.pipeline.store import Batch
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.errors import InputError

METRICS_NAME = "metrics.csv"
_COLUMNS = (
    "step",
    "epoch",
    "num_tokens",
    "train_loss",
    "train_kl",
    "train_ce",
    "validation_loss",
    "learning_rate",
    "tokens_per_s",
)


class MetricsFile:
    """`metrics.csv`: a row per logged step; after a resume, rows of steps that will be taken again are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        kept = [row for row in _rows(path) if int(row["step"]) <= first_step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def add(self, **values: float) -> None:
        """Append a row; columns that are left out stay empty."""
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, _COLUMNS).writerow(values)


class Metrics(lightning.Callback):
    """Logs the training loss every few steps and stops a training whose loss is not finite."""

    def __init__(self, file: MetricsFile, every_steps: int, steps_per_epoch: float, tokens_per_step: int) -> None:
        self._file, self._every = file, every_steps
        self._steps_per_epoch, self._tokens_per_step = steps_per_epoch, tokens_per_step
        self._last_time, self._last_step = time.monotonic(), 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """The step that a resumed training begins with has its row."""
        self._last_time, self._last_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Write a row at the interval and at the last step; micro-batches before a step's last one take none."""
        step = trainer.global_step
        if step == self._last_step or (step % self._every and step != trainer.max_steps):
            return
        last = module.last
        loss, ce = float(last.loss.detach()), float(last.ce_N.mean())
        kl = {} if last.kl_N is None else {"train_kl": round(float(last.kl_N.mean()), 6)}
        if not math.isfinite(loss):
            raise InputError(
                "the loss is not finite",
                where=f"training step {step}",
                found=loss,
                expected="a number",
                fix="lower the learning rate, or train in 32-true",
            )
        now = time.monotonic()
        rate = (step - self._last_step) * self._tokens_per_step / max(now - self._last_time, 1e-9)
        self._last_time, self._last_step = now, step
        self._file.add(
            step=step,
            epoch=round(step / self._steps_per_epoch, 4),
            num_tokens=step * self._tokens_per_step,
            train_loss=round(loss, 6),
            train_ce=round(ce, 6),
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            tokens_per_s=round(rate, 1),
            **kl,
        )


class HeldOut(lightning.Callback):
    """Measures the cross-entropy of held-out text every few steps and at the end."""

    def __init__(self, file: MetricsFile, batches: Iterable[Batch], every_steps: int, tokens_per_step: int) -> None:
        self._file, self._batches = file, list(batches)
        self._every, self._tokens_per_step, self._last_step = every_steps, tokens_per_step, 0

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
        self._file.add(step=step, num_tokens=step * self._tokens_per_step, validation_loss=round(loss, 6))


class Checkpoints(lightning.Callback):
    """Saves model, optimizer and the loader's position every few steps; the last two are kept."""

    def __init__(self, folder: Path, every_steps: int, accumulate: int) -> None:
        self._folder, self._every, self._accumulate = folder, every_steps, accumulate
        folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save at the interval, where a step has just been taken."""
        step = trainer.global_step
        if step % self._every or (batch_idx + 1) % self._accumulate or step == trainer.max_steps:
            return
        path = self._folder / f"step-{step:08d}.ckpt"
        temporary = path.with_suffix(".saving")
        trainer.save_checkpoint(temporary)
        temporary.replace(path)
        for old in sorted(self._folder.glob("step-*.ckpt"))[:-2]:
            old.unlink()


class Progress(lightning.Callback):
    """Feeds the progress bar."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._last_step = meter, -1

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin where a resumed training begins."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count tokens of every micro-batch and steps as they are taken."""
        step = trainer.global_step
        note = f"loss {float(module.last.loss.detach()):.3f}" if batch.labels_BL.device.type == "cpu" else ""
        self._meter.advance(step - self._last_step, tokens=batch.num_tokens, note=note)
        self._last_step = step


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


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from."""
    return max(folder.glob("step-*.ckpt"), default=None)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # a killed process may have left half a row at the end
        return [row for row in csv.DictReader(file) if row.get("tokens_per_s") is not None and row["step"].isdigit()]
