"""What a training writes down while it runs: rows of metrics.csv, and the progress bar."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import lightning

from capgap.pipeline.progress import Meter
from capgap.pipeline.store import Batch
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


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # a killed process may have left half a row at the end
        return [row for row in csv.DictReader(file) if row.get("tokens_per_s") is not None and row["step"].isdigit()]
