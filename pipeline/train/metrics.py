"""Writes the figures of a running training: rows of metrics.csv and of every logger, and the progress bar.

micro-batch --RunningSums, on the device--> read once an interval --> row --> metrics.csv, loggers
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only

from capgap.pipeline.stage.progress import Meter
from capgap.pipeline.stage.scalars import TRAINING_SCALARS
from capgap.pipeline.store import Batch
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.not_finite import NotFinite
from capgap.pipeline.train.timer import TrainingTimer

_STATE = "capgap_metrics"
COLUMNS = ("step", *TRAINING_SCALARS)


@dataclass(frozen=True)
class ResumedLogger:
    """A Lightning logger and the last step that it has logged.

    Attributes:
        logger: The Lightning logger.
        last_step: The last step that it has logged, or -1; rows up to this step are not sent to it again.
    """

    logger: Any
    last_step: int


def last_kept_step(first_step: int) -> int:
    """Return the last step whose row is kept when a training begins after `first_step`.

    A training that resumes goes on behind its checkpoint. One that begins anew may measure step 0 again, so it keeps no
    row, and -1 is returned.
    """
    return first_step or -1


class MetricsFile:
    """`metrics.csv` and the loggers that receive its rows; only rank 0 of a training writes.

    The rows of steps that will be taken or measured again are dropped. A row reaches the file before the loggers.

    Args:
        path: The path of the file.
        first_step: The step after which the training begins; above 0 it resumes from a checkpoint.
        loggers: The loggers; each receives the rows of steps after its last one.
    """

    def __init__(self, path: Path, first_step: int, loggers: Sequence[ResumedLogger] = ()) -> None:
        self._path, self._first_step, self._loggers = path, first_step, loggers
        self._begin()

    @rank_zero_only
    def _begin(self) -> None:
        kept = [row for row in read_rows(self._path) if int(row["step"]) <= last_kept_step(self._first_step)]
        with self._path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    @rank_zero_only
    def add(self, *, step: int, **values: float | None) -> None:
        """Append a row; columns without a value, or with None, stay empty."""
        known = {name: value for name, value in values.items() if value is not None}
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": step, **known})
        for one in self._loggers:
            if step > one.last_step:
                one.logger.log_metrics(known, step=step)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a metrics file as dictionaries by column; an empty list where there is no file."""
    if not path.is_file():
        return []
    # A killed process may have left an incomplete row at the end.
    whole, _, _ = path.read_text().rpartition("\n")
    rows = csv.DictReader(whole.splitlines())
    return [row for row in rows if None not in row and None not in row.values() and row["step"].isdigit()]


class RunningSums:
    """Sums over the micro-batches of an interval. They stay on the device, so that adding does not wait for it."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, values: Sequence[torch.Tensor]) -> None:
        """Add one value to each sum; the values are scalars on one device, always in the same order."""
        row = torch.stack([value.detach() for value in values]).double()
        self._sums = row if self._sums is None else self._sums + row

    def look(self, trainer: Any) -> list[float] | None:
        """Return the sums over all ranks, or None before anything was added. This waits for the device."""
        if self._sums is None:
            return None
        sums: list[float] = trainer.strategy.reduce(self._sums, reduce_op="sum").tolist()
        return sums

    def take(self, trainer: Any) -> list[float]:
        """Return the sums over all ranks and reset them. This waits for the device."""
        sums = self.look(trainer)
        assert sums is not None
        self._sums = None
        return sums

    def put(self, sums: list[float] | None, trainer: Any, device: torch.device) -> None:
        """Continue from sums over all ranks, as `look` returned them: rank 0 takes them, and the others begin at 0."""
        if sums is not None:
            share = 1.0 if trainer.is_global_zero else 0.0
            self._sums = share * torch.tensor(sums, dtype=torch.float64, device=device)


class Metrics(lightning.Callback):
    """Writes a row of figures every few steps and after the last step.

    `train_loss`, `train_kl`, `train_ce` (nats/token) and `gradient_norm` (before clipping) are means since the previous
    row: over the micro-batches of all ranks, or over steps for the norm. `train_kl` is the divergence that alpha
    weighs, over the micro-batches that have one; with alpha 0 there is none. For a `sampled` cache it contains the
    entropy of the samples, not that of the teacher. `data_wait_fraction` is the share of the time spent waiting for the
    loader. It and `tokens_per_s` leave out the time of measurements on held-out text. `memory_bytes` is the peak memory
    of tensors so far on a GPU, and the current memory of the process on a CPU.

    Args:
        file: Receives the rows.
        watch: Is asked to check all pending losses and gradients before a row is written.
        timer: Measures the time spent waiting for the loader and in measurements.
        every_steps: Number of steps from one row to the next.
        steps_per_epoch: Number of steps in one pass over the data.
        tokens_per_step: Number of targets in a step.
    """

    def __init__(
        self,
        file: MetricsFile,
        watch: NotFinite,
        timer: TrainingTimer,
        every_steps: int,
        steps_per_epoch: float,
        tokens_per_step: int,
    ) -> None:
        self._file, self._watch, self._timer, self._every = file, watch, timer, every_steps
        self._steps_per_epoch, self._tokens_per_step = steps_per_epoch, tokens_per_step
        self._losses, self._norms = RunningSums(), RunningSums()
        self._loaded: dict[str, list[float] | None] = {}
        self._begin(0)

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Restore the sums of a resumed training, whose first step already has its row, and start the interval."""
        self._seen_step = trainer.global_step
        self._losses.put(self._loaded.get("losses"), trainer, module.device)
        self._norms.put(self._loaded.get("norms"), trainer, module.device)
        self._begin(trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the sums of the current interval, so that a resumed training writes the same row at its end."""
        checkpoint[_STATE] = {"losses": self._losses.look(trainer), "norms": self._norms.look(trainer)}

    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the stored sums until the training starts."""
        self._loaded = checkpoint.get(_STATE, {})

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Add the micro-batch's figures to the sums, and write a row if it is due or after the last step."""
        self._losses.add(_means(module, batch))
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        self._norms.add([module.gradient_norm, torch.ones_like(module.gradient_norm)])
        if step % self._every and step != trainer.max_steps:
            return
        self._watch.settle(trainer)
        loss, ce, kl, num_with_kl, num_micro_batches = self._losses.take(trainer)
        norm, num_norms = self._norms.take(trainer)
        elapsed_s = max(time.monotonic() - self._time - (self._timer.excluded_s - self._excluded_s), 1e-9)
        self._file.add(
            step=step,
            epoch=round(step / self._steps_per_epoch, 4),
            num_tokens=step * self._tokens_per_step,
            train_loss=round(loss / num_micro_batches, 6),
            train_kl=round(kl / num_with_kl, 6) if num_with_kl else None,
            train_ce=round(ce / num_micro_batches, 6),
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            gradient_norm=round(norm / num_norms, 6),
            tokens_per_s=round((step - self._step) * self._tokens_per_step / elapsed_s, 1),
            data_wait_fraction=round((self._timer.data_wait_s - self._data_wait_s) / elapsed_s, 4),
            memory_bytes=memory_bytes(module.device),
        )
        self._begin(step)

    def _begin(self, step: int) -> None:
        self._time, self._step = time.monotonic(), step
        self._data_wait_s, self._excluded_s = self._timer.data_wait_s, self._timer.excluded_s


class Progress(lightning.Callback):
    """Feeds the progress bar."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._last_step = meter, -1

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start counting at the step from which a resumed training goes on."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Count the tokens of every micro-batch, and each step that was completed."""
        step = trainer.global_step
        note = _losses(module, batch) if batch.labels_BL.device.type == "cpu" else ""
        self._meter.advance(step - self._last_step, tokens=batch.num_tokens, note=note)
        self._last_step = step


def _losses(module: DistillationModule, batch: Batch) -> str:
    """Return the losses of the last micro-batch as text, first the cross-entropy, which can be compared across arms."""
    _, ce, kl, _, _ = (float(value.detach()) for value in _means(module, batch))
    if module.last is None or module.last.kl_N is None:
        return f"cross-entropy {ce:.3f}"
    return f"cross-entropy {ce:.3f}, {module.divergence_name(batch)} {kl:.3f}"


def memory_bytes(device: torch.device) -> int:
    """Return the peak bytes of tensors so far on a GPU, or the bytes of memory that the process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # The second number in the file is the resident set size in pages.
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _means(module: DistillationModule, batch: Batch) -> list[torch.Tensor]:
    """Return a micro-batch's loss, its cross-entropy and divergence as means over its labels, and two counters.

    The counters are 1 if the micro-batch has a divergence (it has none where alpha is 0) or else 0, and always 1.
    """
    last = module.last
    assert last is not None
    known = batch.num_counted
    count = (batch.labels_BL >= 0).sum().clamp(min=1) if known is None else max(known, 1)
    none, one = torch.zeros_like(last.loss), torch.ones_like(last.loss)
    kl, has_kl = (none, none) if last.kl_N is None else (last.kl_N.sum() / count, one)
    return [last.loss, last.ce_N.sum() / count, kl, has_kl, one]
