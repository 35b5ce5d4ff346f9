"""Train a model on a shard set; a training that was killed goes on from its last checkpoint when it is run again."""

from __future__ import annotations

import copy
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.pipeline.stage.folder import LOGS_FOLDER, WORK_FOLDER, plan_units
from capgap.pipeline.stage.progress import Meter, progress
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.train.attention import require_ending_attention
from capgap.pipeline.train.callbacks import make_callbacks
from capgap.pipeline.train.checkpoints import Checkpoints, best_checkpoint, checkpoint_to_resume, step_of
from capgap.pipeline.train.data import training_loader
from capgap.pipeline.train.fits import require_memory, require_positions
from capgap.pipeline.train.loggers import LogBook, make_loggers
from capgap.pipeline.train.metrics import MetricsFile, ResumedLogger, read_rows
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.online import OnlineModule
from capgap.pipeline.train.replay import setting_of
from capgap.pipeline.train.saved import read_checkpoint, whole
from capgap.pipeline.train.strategy import gather_into, is_sharded
from capgap.pipeline.train.task import TrainingTask
from capgap.pipeline.train.timer import TimedLoader, TrainingTimer
from capgap.pipeline.train.trainer import make_trainer, quiet_lightning

_LOG = logging.getLogger("capgap")


def fit(model: PreTrainedModel, task: TrainingTask) -> dict[str, Any]:
    """Train `model` in place and return totals for the manifest.

    With several ranks, every rank calls it within torch's process group, and rank 0 receives the trained weights.

    Raises:
        InputError: There is too little data for one step; a loss or a gradient is not finite; a logger's package is not
            installed; or `DistillationModule` cannot train the model, the model takes shorter sequences, or its
            attention reaches across the documents of a row.
        SettingError: A logger does not exist.
        CorruptError: Shards are damaged, or targets are not aligned with their tokens.
        MachineError: The model and its optimizer do not fit into the device's memory, or torch.compile does not work.
    """
    is_first, sharded = task.ranks.is_first, is_sharded(task.settings, task.ranks)
    loader = training_loader(task)
    _require_ending_attention(model, task)
    # FSDP2 divides a model's parameters in place, and the caller's model must stay whole.
    student = copy.deepcopy(model) if sharded and is_first else model
    module = _module(student, task, loader.num_steps)
    _require_room(model, task)
    checkpoint = _checkpoint_to_resume(task, loader.num_steps)
    first_step = 0 if checkpoint is None else step_of(checkpoint)
    loggers = _loggers(task, first_step)
    timer = TrainingTimer()
    callbacks = make_callbacks(
        task,
        loader,
        MetricsFile(task.folder / METRICS_NAME, first_step, loggers),
        timer,
        setting_of(task, model, task.checkpoint_folder, loader.num_steps),
    )
    student.train()
    with _meter(task, loader.num_steps, first_step) as meter, quiet_lightning():
        trainer = make_trainer(task, loader.num_steps, loggers, callbacks.in_order(meter))
        try:
            trainer.fit(module, TimedLoader(loader, timer), ckpt_path=checkpoint, weights_only=True)
        except SystemExit:
            # Lightning raises it for an interrupt, and for the signal by which a cluster ends a job.
            raise KeyboardInterrupt from None
    if sharded:
        gather_into(model if is_first else None, student)
    model.to("cpu").eval()
    best = _take_best(model, callbacks.checkpoints) if task.settings.output == "best" and is_first else {}
    return {
        "num_steps": loader.num_steps,
        "num_tokens": loader.num_tokens,
        "num_epochs": round(loader.num_steps / loader.steps_per_epoch, 4),
        **_measured_before(task.folder / METRICS_NAME),
        **best,
        **({"skipped_sequences": loader.skipped} if loader.skipped else {}),
    }


def _require_ending_attention(model: PreTrainedModel, task: TrainingTask) -> None:
    if task.several_in_a_row:
        for one in (model, task.teacher):
            if one is not None:
                require_ending_attention(one, task.longest_row)


def _require_room(model: PreTrainedModel, task: TrainingTask) -> None:
    settings, seq_len = task.settings, task.training.shard_set.seq_len
    require_positions(model, seq_len)
    num_parts = task.ranks.world_size if is_sharded(settings, task.ranks) else 1
    require_memory(model, settings, task.device, seq_len, num_parts)


def _module(model: PreTrainedModel, task: TrainingTask, num_steps: int) -> DistillationModule:
    arguments: dict[str, Any] = {
        "settings": task.settings,
        "num_steps": num_steps,
        "alpha": task.alpha,
        "temperature": task.temperature,
        "vocab_size": task.training.codec.vocab_size,
        "objective": task.objective,
        "num_micro_batches": task.accumulate * task.ranks.world_size,
    }
    if task.teacher is None:
        return DistillationModule(model, **arguments)
    return OnlineModule(model, **arguments, teacher=task.teacher)


def _checkpoint_to_resume(task: TrainingTask, num_steps: int) -> Path | None:
    """Return the checkpoint to resume from, or None; rank 0 chooses it and sends it to all ranks."""
    checkpoint = None
    if task.ranks.is_first:
        plan_units(task.folder / WORK_FOLDER, "steps", num_steps, "checkpoints/step-*.ckpt")
        checkpoint = checkpoint_to_resume(task.checkpoint_folder)
    if task.ranks.world_size == 1:
        return checkpoint
    chosen = [checkpoint]
    torch.distributed.broadcast_object_list(chosen, 0)
    return chosen[0]


def _loggers(task: TrainingTask, first_step: int) -> list[ResumedLogger]:
    """Return the loggers of rank 0, which have received the settings of the training; other ranks have none."""
    if not task.ranks.is_first:
        return []
    work = task.folder / WORK_FOLDER
    book = LogBook(task.folder / LOGS_FOLDER, work, task.folder / METRICS_NAME, first_step, task.title)
    loggers = make_loggers(task.settings.loggers, book)
    settings = task.settings.model_dump(mode="json", exclude={"loggers"})
    for one in loggers:
        one.logger.log_hyperparams(settings | {"alpha": task.alpha, "temperature": task.temperature, "seed": task.seed})
    return loggers


def _take_best(model: PreTrainedModel, checkpoints: Checkpoints) -> dict[str, Any]:
    """Load the weights of the lowest held-out loss into the model, and return their step and loss as totals.

    Without such weights the model keeps those of the last step, and there are no totals.
    """
    best = best_checkpoint(checkpoints.folder)
    if best is None:
        _LOG.warning("no held-out loss was a finite number: output: best hands on the weights of the last step")
        return {}
    saved = read_checkpoint(best)["state_dict"]
    trained = {name.removeprefix("model."): whole(value) for name, value in saved.items()}
    model.load_state_dict(trained, strict=False)  # frozen weights are not saved
    return {"best_step": checkpoints.best_step, "best_validation_loss": round(checkpoints.best_loss, 6)}


def _measured_before(metrics: Path) -> dict[str, float]:
    """Return the held-out figures from before the first step, which an earlier, killed process may have measured."""
    first = next((row for row in read_rows(metrics) if row["step"] == "0"), {})
    names = ("validation_loss", "heldout_kl", "heldout_teacher_ce", "heldout_top1")
    return {f"first_{name}": float(first[name]) for name in names if first.get(name)}


def _meter(task: TrainingTask, num_steps: int, first_step: int) -> AbstractContextManager[Meter | None]:
    return progress(task.title, num_steps, "steps", first_step) if task.ranks.is_first else nullcontext()
