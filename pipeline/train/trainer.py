"""Sets up Lightning's Trainer for trainings whose checkpoints, metrics and progress bar are capgap's own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning

from capgap.pipeline.stage.device import warn_of_slow_products
from capgap.pipeline.train.metrics import ResumedLogger
from capgap.pipeline.train.strategy import trainer_arguments
from capgap.pipeline.train.task import TrainingTask


def make_trainer(
    task: TrainingTask,
    num_steps: int,
    loggers: Sequence[ResumedLogger],
    callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    """Make the trainer of a task, which takes `num_steps` optimizer steps in one pass over the loader."""
    precision = task.settings.precision
    if precision.startswith("bf16"):
        warn_of_slow_products(f"precision {precision}", task.device, "bfloat16", "set precision to 32-true")
    return lightning.Trainer(
        **trainer_arguments(task.settings, task.ranks, task.device),
        precision=precision,
        max_steps=num_steps,
        max_epochs=1,
        accumulate_grad_batches=task.accumulate,
        logger=[one.logger for one in loggers],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, which concern settings that are fixed here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
