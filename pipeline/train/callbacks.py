"""The callbacks of a training: on every rank, because what they measure may need all ranks; the first one writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning

from capgap.pipeline.stage.folder import WORK_FOLDER
from capgap.pipeline.stage.progress import Meter
from capgap.pipeline.store import MixedLoader, SequenceLoader
from capgap.pipeline.train.checkpoints import Checkpoints
from capgap.pipeline.train.data import heldout_batches, num_validation_sequences
from capgap.pipeline.train.heldout import HeldOut
from capgap.pipeline.train.metrics import Metrics, MetricsFile, Progress
from capgap.pipeline.train.not_finite import NOT_FINITE_FOLDER, NotFinite
from capgap.pipeline.train.task import TrainingTask
from capgap.pipeline.train.timer import TrainingTimer


class Callbacks(NamedTuple):
    """One of each kind.

    Attributes:
        not_finite: stops at a loss or a gradient that is not finite.
        metrics: writes rows of metrics.csv.
        heldout: measures held-out text.
        checkpoints: saves checkpoints, and the best weights where they are wanted.
    """

    not_finite: NotFinite
    metrics: Metrics
    heldout: HeldOut
    checkpoints: Checkpoints

    def in_order(self, meter: Meter | None) -> list[lightning.Callback]:
        """As Lightning calls them; a row, a measurement and a checkpoint follow the check for finite numbers."""
        return [*self, *([] if meter is None else [Progress(meter)])]


def make_callbacks(
    task: TrainingTask,
    loader: SequenceLoader | MixedLoader,
    metrics: MetricsFile,
    timer: TrainingTimer,
    replay_setting: dict[str, Any],
) -> Callbacks:
    """The callbacks of a task.

    Args:
        task: the training.
        loader: yields its micro-batches, and can make one of them again.
        metrics: receives rows about steps and held-out text.
        timer: counts the time that is no part of the steps.
        replay_setting: is kept beside a batch whose loss is not finite.
    """
    settings, tokens_per_step = task.settings, loader.tokens_per_step
    not_finite = NotFinite(loader, task.accumulate, task.folder / WORK_FOLDER / NOT_FINITE_FOLDER, replay_setting)
    num_sequences = num_validation_sequences(task, loader.num_steps)
    heldout = HeldOut(
        metrics,
        not_finite,
        timer,
        lambda: heldout_batches(task, num_sequences),
        settings.validate_every_steps,
        tokens_per_step,
        also_before=task.measures_before,
    )
    checkpoints = Checkpoints(
        task.checkpoint_folder,
        settings.checkpoint_every_steps,
        task.accumulate,
        settings.keep_checkpoints,
        task.seed,
        heldout if settings.output == "best" else None,
    )
    steps_per_epoch = loader.steps_per_epoch
    rows = Metrics(metrics, not_finite, timer, settings.log_every_steps, steps_per_epoch, tokens_per_step)
    return Callbacks(not_finite, rows, heldout, checkpoints)
