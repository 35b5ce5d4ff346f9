"""What a training goes on from after a kill, and which of its weights are the best.

step-00000200.ckpt   model, optimizer, loader's position, every rank's random numbers: the last few
best-00000200.ckpt   the weights at the lowest held-out loss so far
*.saving             half-written; a kill left it
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch

from capgap.pipeline.store import Batch
from capgap.pipeline.train.heldout import HeldOut
from capgap.pipeline.train.randomness import random_state, seed_process, set_random_state
from capgap.pipeline.train.saved import fault_of, publish

_NAME = re.compile(r"(?:step|best)-\d{8,15}\.ckpt")
_LOG = logging.getLogger("capgap")


class Checkpoints(lightning.Callback):
    """Saves every few steps and at the best held-out loss; begins and restores the random numbers.

    Every rank calls it, and after `HeldOut`; the first gives files their names and deletes old ones.

    Args:
        folder: of the checkpoints.
        every_steps: interval.
        accumulate: micro-batches of a step on each rank.
        keep: how many of the last ones stay.
        seed: of random numbers.
        heldout: whose measurements decide which weights are best; None where the best are not kept.

    Attributes:
        folder: of the checkpoints.
        best_loss: lowest held-out loss so far.
        best_step: at which it was measured.
    """

    def __init__(
        self, folder: Path, every_steps: int, accumulate: int, keep: int, seed: int, heldout: HeldOut | None
    ) -> None:
        self.folder, self._every, self._accumulate, self._keep = folder, every_steps, accumulate, keep
        self._seed, self._heldout = seed, heldout
        self._random: list[dict[str, Any]] = []
        self.best_loss, self.best_step = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """Random numbers of every rank, and the best held-out loss so far; every rank calls it."""
        states = [random_state()]
        if torch.distributed.is_initialized():
            states = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(states, random_state())
        return {"random": states, "best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up; random numbers when the training starts."""
        self._random = state_dict["random"]
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Begin with this rank's random numbers: those of the checkpoint, or new ones if it had other ranks."""
        rank, num_ranks = trainer.global_rank, trainer.world_size
        if len(self._random) == num_ranks:
            set_random_state(self._random[rank])
        else:
            seed_process(self._seed, rank, num_ranks, trainer.global_step)
        self._random = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save where a step has just been taken: weights that are the best, and all at the interval."""
        step = trainer.global_step
        if (batch_idx + 1) % self._accumulate:
            return
        measured = None if self._heldout is None else self._heldout.measured
        if measured is not None and measured[0] == step and trainer.strategy.broadcast(measured[1] < self.best_loss):
            self.best_step, self.best_loss = measured
            self._save(trainer, f"best-{step:08d}", weights_only=True)
        if step % self._every == 0 and step != trainer.max_steps:
            self._save(trainer, f"step-{step:08d}")

    def _save(self, trainer: Any, name: str, weights_only: bool = False) -> None:
        temporary, path = self.folder / f"{name}.saving", self.folder / f"{name}.ckpt"
        trainer.save_checkpoint(temporary, weights_only=weights_only)
        if trainer.is_global_zero:
            publish(temporary, path)
            self._delete_old()

    def _delete_old(self) -> None:
        steps = _saved(self.folder, "step")
        for path in steps[: -self._keep]:
            _delete(path)
        kept = [step_of(path) for path in steps[-self._keep :]]
        best = _saved(self.folder, "best")
        # whichever checkpoint a training goes on from, the best of its time is there
        needed = {max((path for path in best if step_of(path) <= step), default=None) for step in kept}
        needed |= set(best[-1:])
        for path in best:
            if path not in needed:
                _delete(path)


def checkpoint_to_resume(folder: Path) -> Path | None:
    """The newest sound checkpoint, and nothing in the folder that is newer; damaged ones are named and deleted.

    Only one process may call it, before any other looks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    resume, fault = None, ""
    for path in reversed(_saved(folder, "step")):
        fault = fault_of(path)
        if not fault:
            resume = path
            break
        _LOG.warning("%s is damaged (%s): the one before it is used", path, fault)
    step = 0 if resume is None else step_of(resume)
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) is None or step_of(path) > step:
            _delete(path)
    return resume


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint, of a training that may still run."""
    return next((path for path in reversed(_saved(folder, "step")) if not fault_of(path)), None)


def best_checkpoint(folder: Path) -> Path:
    """The weights at the lowest held-out loss of a training that has ended."""
    return _saved(folder, "best")[-1]


def step_of(path: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(path.stem.split("-")[1])


def _saved(folder: Path, kind: str) -> list[Path]:
    """Checkpoints of a kind, the newest last; what has another name is none."""
    return sorted(path for path in folder.glob(f"{kind}-*") if _NAME.fullmatch(path.name))


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
