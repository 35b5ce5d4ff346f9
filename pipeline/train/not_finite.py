"""A loss or a gradient that is not finite stops the training at once, by name, and its batch is kept.

    micro-batch --> two flags on the device --copied beside the computation--> looked at a few micro-batches later
                                                                          and before anything is written

No step waits for the device. On a CPU the flags are looked at at once; on a GPU at most four micro-batches later. A row
of metrics, a measurement and a checkpoint wait for all flags, so none of them is ever of a poisoned model.

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

# A GPU is given work for some milliseconds ahead; four micro-batches are more than that, and little to lose.
_BEHIND = 4


class MicroBatchSource(Protocol):
    """Where micro-batches come from."""

    def micro_batch(self, number: int) -> Batch:
        """This rank's micro-batch of that number, made again."""

    def names(self, number: int) -> list[str]:
        """Shard, member and row of each of its sequences."""


@dataclass(frozen=True)
class _Flags:
    """What one micro-batch came to.

    Attributes:
        number: of the micro-batch, over the whole training.
        finite_2: whether its loss and the gradient of the step that it ended are finite, in the host's memory.
        copied: when that copy is done; None where nothing had to be copied.
        values_2: the loss and the gradient's norm, on the device.
        rows_N: what came of each row, on the device: one sum of its KL and cross-entropy.
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
        source: of the micro-batches.
        accumulate: micro-batches in a step.
        folder: receives the micro-batches at fault; it must not outlive the training.
        setting: what else a replay must know, as JSON values.
    """

    def __init__(self, source: MicroBatchSource, accumulate: int, folder: Path, setting: dict[str, Any]) -> None:
        self._source, self._accumulate, self._folder, self._setting = source, accumulate, folder, setting
        self._pending: deque[_Flags] = deque()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note the flags, and look at those that have arrived.

        Raises:
            InputError: one of them is not finite.
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
        """Wait for all flags; errors as `on_train_batch_end`."""
        while self._pending:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Let no checkpoint be of a model that met what is not finite."""
        self.settle(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Let the last weights be of no such model either."""
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
        # the norm is of all that the step added up
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
            fix="lower the learning rate, or train in 32-true. To see it again, alone: "
            f"{shlex.join([Path(sys.executable).name, '-m', 'capgap.pipeline.train.replay', str(folder)])}",
        )

    def _kept(self, number: int, flags: _Flags) -> KeptBatch:
        names = self._source.names(number)
        rows = [] if number != flags.number else flags.rows_N.isfinite().logical_not().nonzero().flatten().tolist()
        # as many rows a sequence
        wrong = sorted({row * len(names) // len(flags.rows_N) for row in rows})
        return KeptBatch(number, self._source.micro_batch(number), names, [names[i] for i in wrong] or names)


def _to_host(flags_2: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    if flags_2.device.type != "cuda":
        return flags_2.cpu(), None
    host_2 = torch.empty(flags_2.shape, dtype=flags_2.dtype, pin_memory=True)
    host_2.copy_(flags_2, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return host_2, copied


def _list(names: Sequence[str]) -> str:
    """All of them, or the first few and how many more."""
    shown = "; ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown}; and {len(names) - 4} sequences more"
