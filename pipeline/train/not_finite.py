"""Stops a training at a loss or gradient that is not finite, names its sequences and stores its micro-batches.

    micro-batch --> two flags on the device --copied during the computation--> checked a few micro-batches later
                                                                          and before anything is written

No step waits for the device. The flags are checked at once on a CPU, and at most four micro-batches later on a GPU.
Before a metrics row, a measurement or a checkpoint all flags are checked, so none of these comes from a model whose
weights were spoiled by such a gradient.

Legend: N rows of a micro-batch.
"""

from __future__ import annotations

import shlex
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch

from capgap.pipeline.store import Batch
from capgap.pipeline.train.kept_batches import KeptBatch, keep_batches
from capgap.schemas.errors import InputError

NOT_FINITE_FOLDER = "not-finite"

# The host queues a few milliseconds of work ahead of a GPU. Four micro-batches take longer than that, and little
# computation is lost by noticing a fault four micro-batches late.
_BEHIND = 4


class MicroBatchSource(Protocol):
    """A loader that can make any micro-batch of the training again."""

    def micro_batch(self, number: int) -> Batch:
        """Return this rank's micro-batch of the given number, made again."""

    def names(self, number: int) -> list[str]:
        """Return shard, member and row of each sequence of the micro-batch with the given number."""

    def seq_len_of(self, number: int) -> int:
        """Return the number of targets in each sequence of the micro-batch with the given number."""


@dataclass(frozen=True)
class _Flags:
    """The loss and gradient norm of one micro-batch, and whether they are finite.

    Attributes:
        number: Number of the micro-batch, counted over the whole training.
        finite_2: Whether the loss is finite, and whether the norm is; bool, in the host's memory.
        copied: The event that marks the end of the copy to the host; None where nothing had to be copied.
        values_2: The loss, and the norm of the gradient of the step that the micro-batch completes or else 0; on the
            device.
        rows_N: The sum of KL and cross-entropy of each row, on the device.
    """

    number: int
    finite_2: torch.Tensor
    copied: torch.cuda.Event | None
    values_2: torch.Tensor
    rows_N: torch.Tensor

    def are_here(self) -> bool:
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]


class NotFinite(lightning.Callback):
    """Stops at the first loss or gradient that is not finite.

    Args:
        source: The loader, which makes the micro-batches at fault again.
        accumulate: Number of micro-batches in a step on each rank.
        folder: The folder that receives the micro-batches at fault; it must be deleted when the training is finished.
        setting: JSON values that a replay needs beside the micro-batches.
    """

    def __init__(self, source: MicroBatchSource, accumulate: int, folder: Path, setting: dict[str, Any]) -> None:
        self._source, self._accumulate, self._folder, self._setting = source, accumulate, folder, setting
        self._pending: deque[_Flags] = deque()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Record whether the micro-batch's loss and gradient are finite, and check the flags that have arrived.

        Raises:
            InputError: A loss or a gradient is not finite.
        """
        last, loss = module.last, module.last.loss.detach()
        ends_step = (batch_idx + 1) % self._accumulate == 0
        norm = module.gradient_norm.detach().to(loss) if ends_step else torch.zeros_like(loss)
        values_2 = torch.stack([loss, norm])
        finite_2, copied = _to_host(values_2.isfinite())
        rows_N = (last.ce_N if last.kl_N is None else last.ce_N + last.kl_N).detach()
        self._pending.append(_Flags(batch_idx, finite_2, copied, values_2, rows_N))
        while self._pending and (len(self._pending) > _BEHIND or self._pending[0].are_here()):
            self._look(trainer)

    def settle(self, trainer: Any) -> None:
        """Wait for all pending flags and check them.

        Raises:
            InputError: A loss or a gradient is not finite.
        """
        while self._pending:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Check all pending flags, so that no checkpoint is saved after a loss or gradient that is not finite."""
        self.settle(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Check all pending flags, so that the final weights do not follow a loss or gradient that is not finite."""
        self.settle(trainer)

    def _look(self, trainer: Any) -> None:
        flags = self._pending.popleft()
        if flags.copied is not None:
            flags.copied.synchronize()
        if not bool(flags.finite_2.all()):
            raise self._error(flags, trainer)

    def _error(self, flags: _Flags, trainer: Any) -> InputError:
        loss, norm = flags.values_2.tolist()
        step = flags.number // self._accumulate
        loss_is_finite = bool(flags.finite_2[0])
        what, value = ("gradient's norm", norm) if loss_is_finite else ("loss", loss)
        # The gradient is a sum over all micro-batches of the step, so any of them may be at fault.
        first = step * self._accumulate if loss_is_finite else flags.number
        kept = [self._kept(number, flags) for number in range(first, flags.number + 1)]
        setting = self._setting | {"what": what, "value": str(value), "step": step + 1}
        folder = self._folder if trainer.world_size == 1 else self._folder / f"rank-{trainer.global_rank}"
        keep_batches(folder, kept, setting)
        return InputError(
            f"the {what} is not finite",
            where=f"training step {step + 1}",
            found=f"{value} at {_list([name for one in kept for name in one.at_fault])}",
            expected="a number",
            fix=f"lower the learning rate, or train in 32-true. {self._seen_again(folder)}",
        )

    def _seen_again(self, folder: Path) -> str:
        """Return how the kept batches are computed again, or where they are if a replay cannot make the model again."""
        not_repeated = self._setting["steps"]["not_repeated"]
        if not_repeated:
            return f"The batch is in {folder}; it cannot be computed again alone: {not_repeated}"
        command = [Path(sys.executable).name, "-m", "capgap.pipeline.train.replay", str(folder)]
        return f"To see it again, alone: {shlex.join(command)}"

    def _kept(self, number: int, flags: _Flags) -> KeptBatch:
        names = self._source.names(number)
        rows = [] if number != flags.number else flags.rows_N.isfinite().logical_not().nonzero().flatten().tolist()
        batch, seq_len = self._source.micro_batch(number), self._source.seq_len_of(number)
        num_packed, row_len = batch.input_ids_BL.shape
        # A packed row holds whole sequences and then padding, which belongs to none of them.
        per_row = len(names) // num_packed
        places = [(row // row_len, row % row_len // seq_len) for row in rows]
        wrong = sorted({packed * per_row + place for packed, place in places if place < per_row})
        return KeptBatch(number, batch, names, [names[i] for i in wrong] or names)


def _to_host(flags_2: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if flags_2.device.type != "cuda":
        return flags_2.cpu(), None
    host_2 = torch.empty(flags_2.shape, dtype=flags_2.dtype, pin_memory=True)
    host_2.copy_(flags_2, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host_2, copied


def _list(names: Sequence[str]) -> str:
    """Return all names as text, or the first four and the number of the others."""
    shown = "; ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown}; and {len(names) - 4} sequences more"
