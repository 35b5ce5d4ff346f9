"""What a training goes on from after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning

from capgap.pipeline.store import Batch


class Checkpoints(lightning.Callback):
    """Saves model, optimizer and the loader's position every few steps; the last two are kept."""

    def __init__(self, folder: Path, every_steps: int, accumulate: int) -> None:
        self._folder, self._every, self._accumulate = folder, every_steps, accumulate
        folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Save at the interval, where a step has just been taken."""
        step = trainer.global_step
        if step % self._every or (batch_idx + 1) % self._accumulate or step == trainer.max_steps:
            return
        path = self._folder / f"step-{step:08d}.ckpt"
        temporary = path.with_suffix(".saving")
        trainer.save_checkpoint(temporary)
        temporary.replace(path)
        for old in sorted(self._folder.glob("step-*.ckpt"))[:-2]:
            old.unlink()


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from."""
    return max(folder.glob("step-*.ckpt"), default=None)
