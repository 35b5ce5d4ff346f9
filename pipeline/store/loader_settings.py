"""The settings of a loader."""

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

# The smallest allowed value of each integer setting.
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
        batch_sequences: Number of sequences in one step, over all ranks and micro-batches.
        seed: Seed of the order of the sequences.
        num_epochs: Number of passes over the data.
        max_tokens: The loader stops before the step that would pass this many targets, even within an epoch.
        micro_batch: Number of sequences in one micro-batch on one rank; None for a rank's whole share of a step.
        rank: Number of this process, from 0 on.
        world_size: Number of processes. `micro_batch` times `world_size` must divide `batch_sequences`. Each process
            holds open the lanes it reads: lanes / world_size if this is a whole number, otherwise all lanes.
        row_len: Number of targets in a row of a batch. A row holds as many whole sequences as fit, each with its own
            positions, and the rest of it is padding without weight. If it is None, a row is one sequence.
        lanes: Number of lanes of the order; None for 64, or fewer if there are less than 128 members.
        on_corrupt: `stop` raises at a damaged member. `skip` replaces each of its sequences by a sound one that is read
            at about the same time, as `Order.candidates` describes. Damage to more than 0.1 % of the sequences raises
            in any case; shards in quarantine are not counted.
        threads: Number of threads that read and decode ahead; 0 reads each batch when it is asked for. Two threads
            feed a GPU with half a million tokens a second.
        ahead: Largest number of micro-batches that are being made or are ready. Four cover the time in which a member
            is decoded.
        max_block_bytes: Largest size of the decoded blocks in memory, in bytes. Below the size of the open windows
            (550 MB for members of 8k tokens at 64 ids a token), blocks are decoded more than once.
        decode_on: Device that decodes and holds the batches. If it is None, threads of the host decode, and the batches
            are in host memory. The values of the batches are the same.
        pin: Whether batches are copied to page-locked memory, so that their transfer overlaps with computation; None
            for yes if CUDA is available.
        target_temperature: The extra temperature of the targets, from `target_temperature_of`; None for the capture
            temperature.
        context: Context rule under which the teacher scored. Under `document`, batches have positions that restart at
            each document, and the student's attention must not cross these places.
        writer_logprobs: For text that a student wrote, a function of shard and row numbers that returns the logprob
            of each label of the sequence [L]. If it is not None, batches hold the writer's and the teacher's logprobs,
            and the host must decode.

    Raises:
        SettingError: A value is out of bounds, or two values contradict each other.
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
        """Return the number of sequences in one micro-batch on one rank."""
        return self.micro_batch or max(1, self.batch_sequences // self.world_size)

    @property
    def round_sequences(self) -> int:
        """Return the number of sequences in one micro-batch, summed over all ranks."""
        return self.rank_sequences * self.world_size


def _require_whole(name: str, value: object, least: int | None = None, may_be_none: bool = False) -> None:
    """Raise SettingError if a value is no whole number or is below `least`."""
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
