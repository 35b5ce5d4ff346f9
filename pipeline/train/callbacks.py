"""The callbacks of a training. They run on every rank, because a measurement may need all ranks; rank 0 writes."""

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
    """The callbacks of one training.

    Attributes:
        not_finite: Stops at a loss or a gradient that is not finite.
        metrics: Writes rows of metrics.csv.
        heldout: Measures held-out text.
        checkpoints: Saves checkpoints, and the weights of the lowest held-out loss where they are wanted.
    """

    not_finite: NotFinite
    metrics: Metrics
    heldout: HeldOut
    checkpoints: Checkpoints

    def in_order(self, meter: Meter | None) -> list[lightning.Callback]:
        """Return the callbacks in the order in which Lightning calls them, the check for finite numbers first.

        So no metrics row, measurement or checkpoint is made from numbers that are not finite.

        Args:
            meter: The progress bar, or None on a rank that shows none.
        """
        return [*self, *([] if meter is None else [Progress(meter)])]


def make_callbacks(
    task: TrainingTask,
    loader: SequenceLoader | MixedLoader,
    metrics: MetricsFile,
    timer: TrainingTimer,
    replay_setting: dict[str, Any],
) -> Callbacks:
    """Make the callbacks of a task.

    Args:
        task: The training.
        loader: Yields the micro-batches, and can make any of them again.
        metrics: Receives rows about steps and held-out text.
        timer: Counts the seconds in which no step is computed.
        replay_setting: JSON values that are stored beside a micro-batch whose loss is not finite.
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
