"""Micro-batches of a shard set, in an order that a single integer resumes.

    position --Stream--> places --BatchMaker--> Batch, made ahead by threads (prefetch) --> consumer

The sequences of a step are the same for any number of ranks, any micro-batch and any number of threads. The state is
the number of sequences handed out over all ranks, the same on every rank; what was made ahead is not counted.
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

# Micro-batches between two questions to the device whether all was sound: each waits for it.
_CHECK_EVERY = 64


class SequenceLoader:
    """Iterates over the micro-batches that remain, and counts what it has handed out.

    Args:
        reader: of the shards.
        settings: how they are read.

    Raises:
        InputError: the set holds too few sequences for one step, the ranks do not divide it, or sequences do not fit.
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
        """What remains, from the position on; closing the iterator stops its threads.

        Raises:
            InputError: an iterator of this loader has come to the end before: the state counts one pass over all
                epochs, so that another would have no batches, and a loop over it would end early without a word.
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
                yield batch
            self._is_spent = True
        finally:
            parts.close()

    @property
    def order(self) -> Order:
        """In which the sequences come."""
        return self._stream.order

    @property
    def blocks(self) -> BlockCache[tuple[int, int]]:
        """The blocks held in memory, by shard and member."""
        return self._maker.blocks

    @property
    def skips(self) -> Skips:
        """The damaged members that were passed over."""
        return self._maker.skips

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self._stream.num_steps

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass over the data."""
        return self._stream.steps_per_epoch

    @property
    def together(self) -> int:
        """Sequences of one micro-batch on every rank."""
        return self.settings.round_sequences

    @property
    def rounds_per_step(self) -> int:
        """Micro-batches of one step on every rank."""
        return self.settings.batch_sequences // self.together

    @property
    def tokens_per_step(self) -> int:
        """Targets of one step over all ranks, without padding."""
        return self.settings.batch_sequences * self.seq_len

    @property
    def num_tokens(self) -> int:
        """Targets of the whole training over all ranks, without padding."""
        return self.num_steps * self.tokens_per_step

    @property
    def skipped(self) -> dict[str, int]:
        """Sequences in each damaged member that was passed over."""
        return self.skips.as_dict()

    @property
    def seq_len(self) -> int:
        """Targets in a sequence."""
        return self._reader.shard_set.seq_len

    @property
    def shape(self) -> tuple[int, int]:
        """Rows in a batch, and targets in a row."""
        row_len = self.settings.row_len or self.seq_len
        return self.settings.rank_sequences // sequences_per_row(row_len, self.seq_len), row_len

    def micro_batch(self, number: int) -> Batch:
        """This rank's micro-batch of that number, counted over the whole training."""
        return self._maker.finish(self._maker.host_part(number), number)

    def require_sound(self) -> None:
        """Raise CorruptError if a micro-batch that a device decoded contradicts the format or its own tokens.

        Asked every 64 micro-batches, before the last one is handed out, and whenever the state is taken: it waits for
        the device. What the host decodes is checked before it is handed out.
        """
        self._maker.require_sound()

    def places(self, number: int) -> list[Place]:
        """Where the sequences of that micro-batch lie, as long as no member is damaged."""
        return self._stream.places(number)

    def names(self, number: int) -> list[str]:
        """The sequences of that micro-batch as errors name them, in its order, as long as no member is damaged."""
        return [f"{self._reader.name_of(*place[:2])}, sequence {place.row}" for place in self.places(number)]

    def state_dict(self) -> dict[str, Any]:
        """The number of sequences handed out over all ranks, what it counts, and what was skipped.

        Raises:
            CorruptError: as `require_sound`.
        """
        self.require_sound()
        return {**self._stream.state_dict(), "skipped": self.skips.as_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many sequences.

        Raises:
            InputError: the state counts in another order, or stops within a round of these micro-batches.
        """
        self._stream.load_state_dict(state)
        self._is_spent = False
        self.skips.load(state.get("skipped", {}))


def another_pass(num_batches: int) -> InputError:
    """What is raised where a loader that has come to its end is iterated once more."""
    return InputError(
        "the loader has handed out all of its batches, and is iterated once more",
        found=f"a second pass after all {num_batches} batches",
        expected="one pass, which goes over the data num_epochs times",
        fix="give the loader as many epochs (num_epochs) and iterate over it once",
    )


def target_temperature_of(codec: Codec, capture: float, temperature: float) -> TargetTemperature | None:
    """What a loader needs for targets at `temperature`, of shards that were recorded at `capture`.

    Raises:
        InputError: nothing was kept at that temperature.
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
