"""The checkpoints from which a killed training goes on, and the weights with the lowest held-out loss.

step-00000200.ckpt   model, optimizer, loader's position, every rank's random state; only the last few are kept
best-00000200.ckpt   the weights at the lowest held-out loss so far
*.saving             an unfinished checkpoint that a killed process left behind
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
    """Saves checkpoints every few steps and at the lowest held-out loss, and seeds or restores random states.

    Every rank calls it, after `HeldOut`. Rank 0 gives the files their final names and deletes old ones.

    Args:
        folder: The folder of the checkpoints.
        every_steps: Number of steps from one checkpoint to the next.
        accumulate: Number of micro-batches in a step on each rank.
        keep: Number of the newest step checkpoints that are kept.
        seed: Seed of the random numbers.
        heldout: The callback whose measurements decide which weights are best; None where the best are not saved.

    Attributes:
        folder: The folder of the checkpoints.
        best_loss: The lowest held-out loss so far, in nats/token.
        best_step: The step at which `best_loss` was measured.
    """

    def __init__(
        self, folder: Path, every_steps: int, accumulate: int, keep: int, seed: int, heldout: HeldOut | None
    ) -> None:
        self.folder, self._every, self._accumulate, self._keep = folder, every_steps, accumulate, keep
        self._seed, self._heldout = seed, heldout
        self._random: list[dict[str, Any]] = []
        self.best_loss, self.best_step = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """Return every rank's random state and the lowest held-out loss so far; all ranks must call it."""
        states = [random_state()]
        if torch.distributed.is_initialized():
            states = [{} for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(states, random_state())
        return {"random": states, "best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the lowest held-out loss, and keep the random states until `on_train_start` restores them."""
        self._random = state_dict["random"]
        self.best_loss, self.best_step = state_dict["best_loss"], state_dict["best_step"]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Restore this rank's random state, or seed a new one if no checkpoint of as many ranks was loaded."""
        rank, num_ranks = trainer.global_rank, trainer.world_size
        if len(self._random) == num_ranks:
            set_random_state(self._random[rank])
        else:
            seed_process(self._seed, rank, num_ranks, trainer.global_step)
        self._random = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """At the end of a step, save the weights if they are the best, and a checkpoint if it is due."""
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
        # For each step checkpoint, keep the best weights up to its step, so that a resumed training still has them.
        needed = {max((path for path in best if step_of(path) <= step), default=None) for step in kept}
        needed |= set(best[-1:])
        for path in best:
            if path not in needed:
                _delete(path)


def checkpoint_to_resume(folder: Path) -> Path | None:
    """Return the newest sound checkpoint, or None, and delete newer, damaged and unfinished files in the folder.

    Damaged checkpoints are reported. Only one process may call it, before any other reads the folder.
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
    """Return the newest sound checkpoint, or None, and delete nothing, because the training may still run."""
    return next((path for path in reversed(_saved(folder, "step")) if not fault_of(path)), None)


def best_checkpoint(folder: Path) -> Path | None:
    """Return the file with the weights of the lowest held-out loss of a training that has ended.

    It is None where no held-out loss was a finite number, since no weights are the best then.
    """
    return max(_saved(folder, "best"), default=None)


def step_of(path: Path) -> int:
    """Return the number of steps after which a checkpoint was saved."""
    return int(path.stem.split("-")[1])


def _saved(folder: Path, kind: str) -> list[Path]:
    """Return the checkpoints of a kind, `step` or `best`, in order of their steps."""
    return sorted(path for path in folder.glob(f"{kind}-*") if _NAME.fullmatch(path.name))


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
