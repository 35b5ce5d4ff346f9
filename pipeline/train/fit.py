"""Train a model on a shard set; kill it at any step, call it again, and it goes on as if undisturbed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from transformers import PreTrainedModel

from capgap.pipeline.progress import progress
from capgap.pipeline.store import Batch, SequenceLoader, ShardReader
from capgap.pipeline.store.batch import Heat, collate
from capgap.pipeline.train.callbacks import (
    METRICS_NAME,
    Checkpoints,
    HeldOut,
    Metrics,
    MetricsFile,
    Progress,
    newest_checkpoint,
)
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.workflow.folder import WORK_FOLDER, plan_units
from capgap.schemas.run_model import OptimizationSettings


@dataclass(frozen=True)
class Task:
    """What to train on, and how.

    Attributes:
        title: shown at the progress bar.
        settings: of the optimization.
        training: shards to train on.
        heldout: shards to measure the held-out loss on.
        alpha: weight of the KL to the targets; 0 for shards without targets.
        temperature: of the targets.
        seed: of the data order.
        device: `cpu` or `cuda:0`.
        folder: of the stage; receives `metrics.csv`, and checkpoints below `work`.
        heat: by which the loader turns the stored targets into those of that temperature.
        objective: which divergence alpha weighs.
    """

    title: str
    settings: OptimizationSettings
    training: ShardReader
    heldout: ShardReader
    alpha: float
    temperature: float
    seed: int
    device: str
    folder: Path
    heat: Heat | None = None
    objective: Objective = Objective()  # noqa: RUF009  # frozen


def fit(model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """Train `model` in place and return totals for the manifest.

    Raises:
        InputError: too little data for one step, or a loss that is not finite.
        CorruptError: shards are damaged, or targets are not aligned with their tokens.
    """
    settings, shard_set = task.settings, task.training.shard_set
    tokens_per_step = settings.batch_sequences * shard_set.seq_len
    accumulate = settings.batch_sequences // settings.micro_batch
    loader = SequenceLoader(
        task.training,
        settings.batch_sequences,
        task.seed,
        num_epochs=settings.num_epochs,
        max_tokens=settings.max_tokens,
        micro_batch=settings.micro_batch,
        on_corrupt=settings.on_corrupt,
        decode_on=task.device if settings.decode == "device" else None,
        heat=task.heat,
    )
    num_steps, steps_per_epoch = loader.num_steps, loader.steps_per_epoch
    module = DistillationModule(
        model, settings, num_steps, task.alpha, task.temperature, task.training.codec.vocab_size, task.objective
    )
    checkpoints = task.folder / WORK_FOLDER / "checkpoints"
    plan_units(task.folder / WORK_FOLDER, "steps", num_steps, "checkpoints/step-*.ckpt")
    resume = newest_checkpoint(checkpoints)
    first_step = int(resume.stem.split("-")[1]) if resume else 0
    metrics = MetricsFile(task.folder / METRICS_NAME, first_step)
    model.train()
    with progress(task.title, num_steps, "steps", first_step) as meter, _quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="cpu" if task.device == "cpu" else "gpu",
            devices=1,
            precision=settings.precision,
            max_steps=num_steps,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[
                Metrics(metrics, settings.log_every_steps, steps_per_epoch, tokens_per_step),
                HeldOut(metrics, _heldout(task), settings.validate_every_steps, tokens_per_step),
                Checkpoints(checkpoints, settings.checkpoint_every_steps, accumulate),
                Progress(meter),
            ],
        )
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    model.to("cpu").eval()
    return {
        "num_steps": num_steps,
        "num_tokens": num_steps * tokens_per_step,
        "num_epochs": round(num_steps / steps_per_epoch, 4),
        **({"skipped_sequences": loader.skips.as_dict()} if loader.skips.as_dict() else {}),
    }


def _heldout(task: Task) -> Iterator[Batch]:
    """The first held-out sequences, in micro-batches."""
    left, reader = task.settings.num_validation_sequences, task.heldout
    for index in range(reader.shard_set.num_members):
        sequences, _ = reader.read(index)
        for start in range(0, min(left, len(sequences)), task.settings.micro_batch):
            stop = min(start + task.settings.micro_batch, left, len(sequences))
            yield collate([(sequences, None, row) for row in range(start, stop)], num_draws=1)
        left -= len(sequences)
        if left <= 0:
            return


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
