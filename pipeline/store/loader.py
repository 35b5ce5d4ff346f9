"""Micro-batches of a shard set, in an order that can be resumed from a single integer.

    position --Stream--> places --BatchMaker--> Batch, made ahead by threads (prefetch) --> consumer

The sequences of a step are the same for any number of ranks, any micro-batch and any number of threads. The state is
the number of sequences handed out over all ranks, which is the same on every rank; prefetched batches are not counted.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from capgap.pipeline.store.batch import Batch, TargetTemperature
from capgap.pipeline.store.batch_maker import BatchMaker
from capgap.pipeline.store.blocks import BlockCache
from capgap.pipeline.store.codec import Codec
from capgap.pipeline.store.loader_settings import LoaderSettings
from capgap.pipeline.store.order import Order, Place
from capgap.pipeline.store.prefetch import prefetch
from capgap.pipeline.store.reader import ShardReader
from capgap.pipeline.store.rows import sequences_per_row
from capgap.pipeline.store.skips import Skips
from capgap.pipeline.store.stream import Stream
from capgap.schemas.errors import InputError

# Micro-batches between two checks of the device's result. The checks are rare because each waits for the device.
_CHECK_EVERY = 64


class SequenceLoader:
    """Iterates over the remaining micro-batches, and counts the sequences that it has handed out.

    Args:
        reader: Reader of the shards.
        settings: How the shards are read.

    Raises:
        InputError: The set holds too few sequences for one step, the micro-batches of all ranks do not divide a step,
            or sequences do not fit into the rows.
    """

    def __init__(self, reader: ShardReader, settings: LoaderSettings) -> None:
        self._reader, self.settings = reader, settings
        self._stream = Stream(reader.shard_set, settings)
        self._maker = BatchMaker(reader, self._stream, settings)
        self._is_spent = False

    def __len__(self) -> int:
        """Micro-batches of the whole training on this rank."""
        return len(self._stream)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield the remaining micro-batches; closing the iterator stops its threads.

        Raises:
            InputError: This loader has handed out its last micro-batch already. The state counts one pass over all
                epochs, so a second loop would end at once and silently train on nothing.
        """
        if self._is_spent:
            raise another_pass(len(self))
        numbers = self._stream.remaining()
        parts = prefetch(numbers, self._maker.host_part, self.settings.threads, self.settings.ahead)
        try:
            for number, part in zip(numbers, parts, strict=True):
                batch = self._maker.finish(part, number)
                if (number + 1) % _CHECK_EVERY == 0 or number + 1 == len(self):
                    self.require_sound()
                self._stream.advance()
                self._is_spent = number + 1 == len(self)  # a loop may stop at the last batch and not ask for another
                yield batch
            self._is_spent = True
        finally:
            parts.close()

    @property
    def order(self) -> Order:
        """Return the order of the sequences."""
        return self._stream.order

    @property
    def blocks(self) -> BlockCache[tuple[int, int]]:
        """Return the cache of the blocks held in memory, by shard and member."""
        return self._maker.blocks

    @property
    def skips(self) -> Skips:
        """Return the damaged members that were skipped."""
        return self._maker.skips

    @property
    def num_steps(self) -> int:
        """Return the number of steps of the whole training."""
        return self._stream.num_steps

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole steps in one pass over the data."""
        return self._stream.steps_per_epoch

    @property
    def together(self) -> int:
        """Return the number of sequences in one micro-batch, summed over all ranks."""
        return self.settings.round_sequences

    @property
    def rounds_per_step(self) -> int:
        """Return the number of micro-batches of one step on each rank."""
        return self.settings.batch_sequences // self.together

    @property
    def tokens_per_step(self) -> int:
        """Return the number of targets of one step over all ranks, without padding."""
        return self.settings.batch_sequences * self.seq_len

    @property
    def num_tokens(self) -> int:
        """Return the number of targets of the whole training over all ranks, without padding."""
        return self.num_steps * self.tokens_per_step

    @property
    def skipped(self) -> dict[str, int]:
        """Return the number of sequences in each damaged member that was skipped, by the member's name."""
        return self.skips.as_dict()

    @property
    def seq_len(self) -> int:
        """Return the number of targets in a sequence."""
        return self._reader.shard_set.seq_len

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of rows in a batch, and of targets in a row."""
        row_len = self.settings.row_len or self.seq_len
        return self.settings.rank_sequences // sequences_per_row(row_len, self.seq_len), row_len

    def micro_batch(self, number: int) -> Batch:
        """Return this rank's micro-batch `number`, counted from 0 over the whole training."""
        return self._maker.finish(self._maker.host_part(number), number)

    def require_sound(self) -> None:
        """Raise CorruptError if a micro-batch that a device decoded contradicts the format or its own tokens.

        The call waits for the device. The loader makes it every 64 micro-batches, before it hands out the last one, and
        in `state_dict`. Batches that the host decodes are checked before they are handed out.
        """
        self._maker.require_sound()

    def places(self, number: int) -> list[Place]:
        """Return the places of the sequences of micro-batch `number`, if no member is damaged."""
        return self._stream.places(number)

    def names(self, number: int) -> list[str]:
        """Return the names in errors of the sequences of micro-batch `number`, if no member is damaged."""
        return [f"{self._reader.name_of(*place[:2])}, sequence {place.row}" for place in self.places(number)]

    def seq_len_of(self, number: int) -> int:
        """Return the number of targets in each sequence of micro-batch `number`, which is the same for all of them."""
        return self.seq_len

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the number of sequences handed out over all ranks, the order's identity, and the skips.

        Raises:
            CorruptError: A micro-batch that a device decoded contradicts the format or its own tokens.
        """
        self.require_sound()
        return {**self._stream.state_dict(), "skipped": self.skips.as_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a state.

        Raises:
            InputError: The state belongs to another order, or stops within a micro-batch of all ranks.
        """
        self._stream.load_state_dict(state)
        self._is_spent = False
        self.skips.load(state.get("skipped", {}))


def another_pass(num_batches: int) -> InputError:
    """Return the error for a second iteration over a loader that has come to its end."""
    return InputError(
        "the loader has handed out all of its batches, and is iterated once more",
        found=f"a second pass after all {num_batches} batches",
        expected="one pass, which goes over the data num_epochs times",
        fix="give the loader as many epochs (num_epochs) and iterate over it once",
    )


def target_temperature_of(codec: Codec, capture: float, temperature: float) -> TargetTemperature | None:
    """Return what a loader needs for targets at `temperature`; None if this is the capture temperature.

    Args:
        codec: Codec of the shards.
        capture: Temperature at which the shards were recorded.
        temperature: Temperature of the targets.

    Raises:
        InputError: The shards hold no targets at this temperature.
    """
    if temperature == capture:
        return None
    if temperature not in codec.extra_temperatures:
        every = sorted((capture, *codec.extra_temperatures))
        raise InputError(
            "the cache has no targets at this temperature",
            found=f"{temperature:g}",
            expected=f"{'one of ' if len(every) > 1 else ''}{', '.join(f'{one:g}' for one in every)}",
            fix="train at one of these, or make a topk cache with it in cache.extra_temperatures",
        )
    number = codec.extra_temperatures.index(temperature)
    return TargetTemperature(number, codec.powers[number])
