"""What a loader is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch

from capgap.pipeline.store.batch import TargetTemperature
from capgap.schemas.errors import SettingError
from capgap.schemas.records import FloatArray
from capgap.schemas.run_corpus import ContextRule

WriterLogprobs = Callable[[int, int], FloatArray]
OnCorrupt = Literal["stop", "skip"]

# The least value of each whole number.
_LEAST = {
    "batch_sequences": 1,
    "num_epochs": 1,
    "max_tokens": 1,
    "micro_batch": 1,
    "world_size": 1,
    "rank": 0,
    "row_len": 1,
    "lanes": 1,
    "threads": 0,
    "ahead": 1,
    "max_block_bytes": 0,
}
_MAY_BE_NONE = ("max_tokens", "micro_batch", "row_len", "lanes")
_ONE_OF = {"on_corrupt": get_args(OnCorrupt), "context": get_args(ContextRule)}


@dataclass(frozen=True)
class LoaderSettings:
    """How a `SequenceLoader` reads a shard set; only the first two have no default.

    Attributes:
        batch_sequences: The sequences in one step, over all ranks and micro-batches.
        seed: It decides the order.
        num_epochs: How many passes over the data there are.
        max_tokens: The loader stops before the step that would pass this many targets, even within an epoch.
        micro_batch: The sequences in one micro-batch on one rank. A rank's whole share of a step where it is None.
        rank: The number of this process.
        world_size: The number of processes. Times the micro-batch, it must divide the step. Each process holds open the
            lanes it reads: lanes / world_size where that is whole, otherwise all of them.
        row_len: The targets in a row of a batch: as many sequences as fit stand in it one after the other, with
            positions of their own, and what is left is padding without weight. A row is one sequence where it is None.
        lanes: How many lanes the order has. 64 where it is None, or fewer for less than 128 members.
        on_corrupt: `stop` raises at a damaged member, and `skip` passes over it: a sound sequence that is read about
            the same time stands for each of its own, as `Order.candidates` says. More damage than 0.1 % of the
            sequences raises in any case, except for shards in quarantine, which are not counted.
        threads: How many read and decode ahead. 0 reads when a batch is asked for. Two feed a GPU with half a million
            tokens a second.
        ahead: How many micro-batches are in the making or ready. Four cover a member that is being decoded.
        max_block_bytes: How much is kept of decoded blocks. The default is above what the open windows of members of 8k
            tokens take, 550 MB at 64 ids a token; below that, blocks are decoded again.
        decode_on: The device that decodes, and on which batches come. Where it is None, threads of the host decode, and
            batches lie in its memory. Batches are the same.
        pin: Whether batches are copied to page-locked memory, for a transfer beside the computation. Where it is None,
            they are if CUDA is there.
        target_temperature: The further temperature at which targets are wanted, by `target_temperature_of`. None stands
            for the capture temperature.
        context: The rule under which the teacher scored. Under `document`, batches have positions that begin anew at
            each document, where the student's attention must end.
        writer_logprobs: Of text that a student wrote, gives the logprob of each label of a sequence [L] by the numbers
            of its shard and of its row there; batches have them, and the teacher's, where it is not None. The host
            must decode.

    Raises:
        SettingError: a value is out of bounds, or two contradict each other.
    """

    batch_sequences: int
    seed: int
    num_epochs: int = 1
    max_tokens: int | None = None
    micro_batch: int | None = None
    rank: int = 0
    world_size: int = 1
    row_len: int | None = None
    lanes: int | None = None
    on_corrupt: OnCorrupt = "stop"
    threads: int = 2
    ahead: int = 4
    max_block_bytes: int = 1 << 30
    decode_on: torch.device | str | None = None
    pin: bool | None = None
    target_temperature: TargetTemperature | None = None
    context: ContextRule = "packed"
    writer_logprobs: WriterLogprobs | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _require_whole(name, getattr(self, name), least, name in _MAY_BE_NONE)
        _require_whole("seed", self.seed)
        if self.rank >= self.world_size:
            raise SettingError(
                "there is no such rank",
                where="rank",
                found=f"{self.rank} of world_size {self.world_size}",
                expected=f"0 to {self.world_size - 1}",
                fix="number the ranks from 0 on",
            )
        for name, known in _ONE_OF.items():
            if getattr(self, name) not in known:
                raise SettingError(
                    "there is no such choice",
                    where=name,
                    found=repr(getattr(self, name)),
                    expected=f"one of {', '.join(known)}",
                )
        if self.decode_on is None:
            return
        try:
            torch.device(self.decode_on)
        except (RuntimeError, TypeError):
            raise SettingError(
                "there is no such kind of device",
                where="decode_on",
                found=repr(self.decode_on),
                expected="the name of one, such as cuda:0, or None for the host",
            ) from None
        if self.writer_logprobs is not None:
            raise SettingError(
                "a device does not read a writer's logprobs",
                where="decode_on",
                found=f"{self.decode_on} with writer_logprobs",
                expected="None, for the host",
            )

    @property
    def rank_sequences(self) -> int:
        """The sequences in one micro-batch on one rank."""
        return self.micro_batch or max(1, self.batch_sequences // self.world_size)

    @property
    def round_sequences(self) -> int:
        """The sequences in one micro-batch on every rank."""
        return self.rank_sequences * self.world_size


def _require_whole(name: str, value: object, least: int | None = None, may_be_none: bool = False) -> None:
    """Raise SettingError where a value is no whole number, or below the least."""
    if value is None and may_be_none:
        return
    if isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least):
        return
    expected = "a whole number" if least is None else f"a whole number, at least {least}"
    raise SettingError(
        "cannot be used",
        where=name,
        found=repr(value),
        expected=expected + (", or None" if may_be_none else ""),
    )
