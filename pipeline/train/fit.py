"""Train a model on a shard set; kill it at any step, call it again, and it goes on as if undisturbed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
from transformers import PreTrainedModel

from capgap.pipeline.progress import progress
from capgap.pipeline.train.checkpoints import Checkpoints, newest_checkpoint
from capgap.pipeline.train.clock import Clock, ClockedLoader
from capgap.pipeline.train.data import heldout_batches, training_loader
from capgap.pipeline.train.heldout import HeldOut
from capgap.pipeline.train.loggers import LogBook, make_loggers
from capgap.pipeline.train.metrics import METRICS_NAME, Metrics, MetricsFile, Progress
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.not_finite import NOT_FINITE_FOLDER, NotFinite
from capgap.pipeline.train.replay import setting_of
from capgap.pipeline.train.task import Task
from capgap.pipeline.workflow.folder import LOGS_FOLDER, WORK_FOLDER, plan_units


def fit(model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """Train `model` in place and return totals for the manifest.

    Raises:
        InputError: too little data for one step, a loss or a gradient that is not finite, a logger without its package.
        SettingError: there is no such logger.
        CorruptError: shards are damaged, or targets are not aligned with their tokens.
    """
    settings, shard_set = task.settings, task.training.shard_set
    tokens_per_step = settings.batch_sequences * shard_set.seq_len
    accumulate = settings.batch_sequences // settings.micro_batch
    loader = training_loader(task)
    num_steps, steps_per_epoch = loader.num_steps, loader.steps_per_epoch
    module = DistillationModule(
        model, settings, num_steps, task.alpha, task.temperature, task.training.codec.vocab_size, task.objective
    )
    work = task.folder / WORK_FOLDER
    checkpoints = work / "checkpoints"
    plan_units(work, "steps", num_steps, "checkpoints/step-*.ckpt")
    resume = newest_checkpoint(checkpoints)
    first_step = int(resume.stem.split("-")[1]) if resume else 0
    book = LogBook(task.folder / LOGS_FOLDER, work, task.folder / METRICS_NAME, first_step, task.title)
    told = make_loggers(settings.loggers, book)
    for one in told:
        one.logger.log_hyperparams(_described(task))
    metrics = MetricsFile(book.metrics, first_step, told)
    clock = Clock()
    watch = NotFinite(loader, accumulate, work / NOT_FINITE_FOLDER, setting_of(task, model, checkpoints))
    heldout = HeldOut(
        metrics, watch, clock, lambda: heldout_batches(task), settings.validate_every_steps, tokens_per_step
    )
    model.train()
    with progress(task.title, num_steps, "steps", first_step) as meter, _quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="cpu" if task.device == "cpu" else "gpu",
            devices=1,
            precision=settings.precision,
            max_steps=num_steps,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            logger=[one.logger for one in told],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[
                watch,
                Metrics(metrics, watch, clock, settings.log_every_steps, steps_per_epoch, tokens_per_step),
                heldout,
                Checkpoints(checkpoints, settings.checkpoint_every_steps, accumulate),
                Progress(meter),
            ],
        )
        trainer.fit(module, ClockedLoader(loader, clock), ckpt_path=resume, weights_only=True)
    model.to("cpu").eval()
    return {
        "num_steps": num_steps,
        "num_tokens": num_steps * tokens_per_step,
        "num_epochs": round(num_steps / steps_per_epoch, 4),
        **({"skipped_sequences": loader.skips.as_dict()} if loader.skips.as_dict() else {}),
    }


def _described(task: Task) -> dict[str, Any]:
    """What trackers show of a training."""
    settings = task.settings.model_dump(mode="json", exclude={"loggers"})
    return settings | {"alpha": task.alpha, "temperature": task.temperature, "seed": task.seed}


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's tips are about set-ups that are fixed here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
