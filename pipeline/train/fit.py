"""Train a model on a shard set; kill it at any step, call it again, and it goes on as if undisturbed."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import PreTrainedModel

from capgap.pipeline.stage.folder import LOGS_FOLDER, WORK_FOLDER, plan_units
from capgap.pipeline.stage.progress import Meter, progress
from capgap.pipeline.stage.scalars import METRICS_NAME
from capgap.pipeline.train.attention import require_ending_attention
from capgap.pipeline.train.checkpoints import Checkpoints, best_checkpoint, checkpoint_to_resume
from capgap.pipeline.train.data import heldout_batches, training_loader
from capgap.pipeline.train.fits import require_memory, require_positions
from capgap.pipeline.train.heldout import HeldOut
from capgap.pipeline.train.loggers import LogBook, make_loggers
from capgap.pipeline.train.metrics import Metrics, MetricsFile, Progress, read_rows
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.not_finite import NOT_FINITE_FOLDER, NotFinite
from capgap.pipeline.train.online import OnlineModule
from capgap.pipeline.train.replay import setting_of
from capgap.pipeline.train.saved import read_checkpoint, whole
from capgap.pipeline.train.strategy import gather_into, is_sharded, trainer_arguments
from capgap.pipeline.train.task import TrainingTask
from capgap.pipeline.train.timer import TimedLoader, TrainingTimer


def fit(model: PreTrainedModel, task: TrainingTask) -> dict[str, Any]:
    """Train `model` in place and return totals for the manifest; of several ranks, the first one's model is trained.

    Every rank calls it, within torch's process group.

    Raises:
        InputError: too little data for one step, a loss or a gradient that is not finite, a logger without its package,
            or a model that `DistillationModule` cannot train, that takes shorter sequences, or that would look across
            the documents of a row.
        SettingError: there is no such logger.
        CorruptError: shards are damaged, or targets are not aligned with their tokens.
        MachineError: the model and its optimizer do not fit into the device's memory, or nothing can be compiled.
    """
    settings, ranks = task.settings, task.ranks
    accumulate = settings.batch_sequences // (task.micro_batch * ranks.world_size)
    loader = training_loader(task)
    if task.several_in_a_row:
        for one in (model, task.teacher):
            if one is not None:
                require_ending_attention(one, task.longest_row)
    num_steps, steps_per_epoch, tokens_per_step = loader.num_steps, loader.steps_per_epoch, loader.tokens_per_step
    sharded = is_sharded(settings, ranks)
    # FSDP2 takes a model apart; what is handed back must be whole
    student = copy.deepcopy(model) if sharded and ranks.is_first else model
    module = _module(student, task, num_steps, accumulate * ranks.world_size)
    require_positions(model, task.training.shard_set.seq_len)
    require_memory(model, settings, task.device, task.training.shard_set.seq_len, ranks.world_size if sharded else 1)
    work = task.folder / WORK_FOLDER
    folder = work / "checkpoints"
    resume = _resume(task, folder, num_steps)
    first_step = int(resume.stem.split("-")[1]) if resume else 0
    book = LogBook(task.folder / LOGS_FOLDER, work, task.folder / METRICS_NAME, first_step, task.title)
    told = make_loggers(settings.loggers, book) if ranks.is_first else []
    for one in told:
        one.logger.log_hyperparams(_described(task))
    metrics = MetricsFile(book.metrics, first_step, told)
    timer = TrainingTimer()
    watch = NotFinite(loader, accumulate, work / NOT_FINITE_FOLDER, setting_of(task, model, folder, num_steps))
    heldout = HeldOut(
        metrics,
        watch,
        timer,
        lambda: heldout_batches(task),
        settings.validate_every_steps,
        tokens_per_step,
        also_before=task.alpha > 0 and task.heldout_targets is not None,
    )
    checkpoints = Checkpoints(
        folder,
        settings.checkpoint_every_steps,
        accumulate,
        settings.keep_checkpoints,
        task.seed,
        heldout if settings.output == "best" else None,
    )
    student.train()
    with _meter(task, num_steps, first_step) as meter, _quiet_lightning():
        trainer = lightning.Trainer(
            **trainer_arguments(settings, ranks, task.device),
            precision=settings.precision,
            max_steps=num_steps,
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            logger=[one.logger for one in told],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # on every rank: what they measure may need all of them; the first writes
            callbacks=[
                watch,
                Metrics(metrics, watch, timer, settings.log_every_steps, steps_per_epoch, tokens_per_step),
                heldout,
                checkpoints,
                *([Progress(meter)] if meter else []),
            ],
        )
        try:
            trainer.fit(module, TimedLoader(loader, timer), ckpt_path=resume, weights_only=True)
        except SystemExit:
            # what Lightning makes of an interrupt, and of the signal by which clusters end a job
            raise KeyboardInterrupt from None
    if sharded:
        gather_into(model if ranks.is_first else None, student)
    model.to("cpu").eval()
    best = _take_best(model, folder, checkpoints) if settings.output == "best" and ranks.is_first else {}
    return {
        "num_steps": num_steps,
        "num_tokens": loader.num_tokens,
        "num_epochs": round(num_steps / steps_per_epoch, 4),
        **_before(task.folder / METRICS_NAME),
        **best,
        **({"skipped_sequences": loader.skipped} if loader.skipped else {}),
    }


def _module(model: PreTrainedModel, task: TrainingTask, num_steps: int, num_micro_batches: int) -> DistillationModule:
    arguments: dict[str, Any] = {
        "settings": task.settings,
        "num_steps": num_steps,
        "alpha": task.alpha,
        "temperature": task.temperature,
        "vocab_size": task.training.codec.vocab_size,
        "objective": task.objective,
        "num_micro_batches": num_micro_batches,
    }
    if task.teacher is None:
        return DistillationModule(model, **arguments)
    return OnlineModule(model, **arguments, teacher=task.teacher)


def _described(task: TrainingTask) -> dict[str, Any]:
    """What trackers show of a training."""
    settings = task.settings.model_dump(mode="json", exclude={"loggers"})
    return settings | {"alpha": task.alpha, "temperature": task.temperature, "seed": task.seed}


def _resume(task: TrainingTask, folder: Path, num_steps: int) -> Path | None:
    """The checkpoint to go on from; the first rank chooses."""
    resume = None
    if task.ranks.is_first:
        plan_units(task.folder / WORK_FOLDER, "steps", num_steps, "checkpoints/step-*.ckpt")
        resume = checkpoint_to_resume(folder)
    if task.ranks.world_size == 1:
        return resume
    word = [resume]
    torch.distributed.broadcast_object_list(word, 0)
    return word[0]


def _take_best(model: PreTrainedModel, folder: Path, checkpoints: Checkpoints) -> dict[str, Any]:
    saved = read_checkpoint(best_checkpoint(folder))["state_dict"]
    trained = {name.removeprefix("model."): whole(value) for name, value in saved.items()}
    model.load_state_dict(trained, strict=False)  # what is frozen is not in it
    return {"best_step": checkpoints.best_step, "best_validation_loss": round(checkpoints.best_loss, 6)}


def _before(metrics: Path) -> dict[str, float]:
    """What was measured before the first step, which may have been taken by a process that was killed."""
    first = next((row for row in read_rows(metrics) if row["step"] == "0"), {})
    names = ("validation_loss", "heldout_kl", "heldout_teacher_ce", "heldout_top1")
    return {f"first_{name}": float(first[name]) for name in names if first.get(name)}


def _meter(task: TrainingTask, num_steps: int, first_step: int) -> AbstractContextManager[Meter | None]:
    return progress(task.title, num_steps, "steps", first_step) if task.ranks.is_first else nullcontext()


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
