"""Micro-batches of a shard set, in an order that a single integer resumes.

    position --Order--> places --BlockCache--> decoded blocks --collate--> Batch, made ahead by threads --> consumer

A step takes the next `batch_sequences` sequences of the stream, over all ranks; rank r of w takes every w-th of them
from r on, a micro-batch at a time. So the sequences of a step are the same for any number of ranks, any micro-batch and
any number of threads. The sequences left over at the end of an epoch, fewer than one step's, are left out of it; each
epoch leaves out others. The state is the number of sequences handed out over all ranks, the same on every rank; what
was made ahead is not counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from typing import Any, Literal

import torch

from capgap.pipeline.store.batch import Batch, Heat, collate
from capgap.pipeline.store.blocks import Block, BlockCache
from capgap.pipeline.store.codec import Codec
from capgap.pipeline.store.device import DeviceDecoder
from capgap.pipeline.store.order import Order, Place
from capgap.pipeline.store.prefetch import prefetch
from capgap.pipeline.store.reader import ShardReader
from capgap.pipeline.store.rows import in_rows, sequences_per_row
from capgap.pipeline.store.skips import Skips
from capgap.pipeline.store.stored import StoredBlock
from capgap.pipeline.store.stored_batch import StoredBatch, gather
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.run_corpus import ContextRule

# Two threads feed a GPU with half a million tokens a second; four micro-batches ahead cover a member being decoded.
_THREADS = 2
_AHEAD = 4
# Above what the open windows of 8k-token members take, 550 MB at 64 ids a token; below it, blocks are decoded again.
_MAX_BLOCK_BYTES = 1 << 30
# Micro-batches between two questions to the device whether all was sound: each waits for it.
_CHECK_EVERY = 64


class SequenceLoader:
    """Iterates over the micro-batches that remain, and counts what it has handed out.

    Args:
        reader: of the shards.
        batch_sequences: sequences in one step, over all ranks and micro-batches.
        seed: of the order.
        num_epochs: passes over the data.
        max_tokens: stop before the step that would pass this many targets, even within an epoch.
        micro_batch: sequences in one micro-batch on one rank; a rank's whole share of a step where it is left out.
        rank: of this process.
        world_size: number of processes; times the micro-batch, it must divide the step. Each holds open the lanes it
            reads: lanes / world_size where that is whole, otherwise all of them.
        row_len: targets in a row of a batch: as many sequences as fit stand in it one after the other, with positions
            of their own, and what is left is padding without weight; a sequence a row where it is left out.
        lanes: of the order; where it is left out, 64, or fewer for less than 128 members.
        on_corrupt: `stop` at a damaged member, or `skip` it: each of its sequences is replaced by the next good one of
            its lane. More damage than 0.1 % of the sequences stops in any case, shards in quarantine not counted.
        threads: that read and decode ahead; 0 reads when asked.
        ahead: micro-batches in the making or ready.
        max_block_bytes: of decoded blocks kept.
        decode_on: the device that decodes, and on which batches come; left out, threads of the host decode and batches
            lie in its memory. Batches are the same.
        pin: copy batches to page-locked memory, for a transfer beside the computation; left out, where CUDA is there.
        heat: the further temperature at which targets are wanted, by `heat_of`; None for the capture temperature.
        context: the rule under which the teacher scored; under `document` batches have positions that begin anew at
            each document, where the student's attention must end.

    Raises:
        InputError: the set holds too few sequences for one step, the ranks do not divide it, or sequences do not fit.
    """

    def __init__(
        self,
        reader: ShardReader,
        batch_sequences: int,
        seed: int,
        *,
        num_epochs: int = 1,
        max_tokens: int | None = None,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        row_len: int | None = None,
        lanes: int | None = None,
        on_corrupt: Literal["stop", "skip"] = "stop",
        threads: int = _THREADS,
        ahead: int = _AHEAD,
        max_block_bytes: int = _MAX_BLOCK_BYTES,
        decode_on: torch.device | str | None = None,
        pin: bool | None = None,
        heat: Heat | None = None,
        context: ContextRule = "packed",
    ) -> None:
        shard_set = reader.shard_set
        self._reader, self._step, self._seed = reader, batch_sequences, seed
        self._rank, self._world_size = rank, world_size
        self.order = Order(
            [shard.num_sequences for shard in shard_set.shards],
            lambda shard: shard_set.shards[shard].members.num_sequences,
            shard_set.num_members,
            seed,
            lanes,
        )
        self._micro_batch = micro_batch or max(1, batch_sequences // world_size)
        self._row_len = row_len
        self._require_divisible()
        self.steps_per_epoch = len(self.order) // batch_sequences
        self.num_steps = _steps(reader, batch_sequences, self.steps_per_epoch * num_epochs, max_tokens)
        excused = {reader.place.name_of(s.file) for s in shard_set.shards if s.file.path in reader.quarantined}
        self.skips = Skips(len(self.order), on_corrupt, excused)
        self.blocks = BlockCache[tuple[int, int]](
            self._read, max_block_bytes, once=self.num_steps <= self.steps_per_epoch
        )
        self._threads, self._ahead = threads, ahead
        self._pin = torch.cuda.is_available() if pin is None else pin
        self._heat, self._context = heat, context
        self._decoder = None if decode_on is None else DeviceDecoder(reader.codec, decode_on, heat)
        self._position = 0

    def __len__(self) -> int:
        """Micro-batches of the whole training on this rank."""
        return self.num_steps * self._step // self.together

    def __iter__(self) -> Generator[Batch, None, None]:
        """What remains, from the position on; closing the iterator stops its threads."""
        rounds = range(self._position // self.together, len(self))
        batches = prefetch(rounds, self._host_part, self._threads, self._ahead)
        try:
            for number, part in zip(rounds, batches, strict=True):
                batch = self._decoded(part, number)
                if (number + 1) % _CHECK_EVERY == 0 or number + 1 == len(self):
                    self.require_sound()
                self._position += self.together
                yield batch
        finally:
            batches.close()

    @property
    def together(self) -> int:
        """Sequences of one micro-batch on every rank."""
        return self._micro_batch * self._world_size

    @property
    def rounds_per_step(self) -> int:
        """Micro-batches of one step on every rank."""
        return self._step // self.together

    @property
    def tokens_per_step(self) -> int:
        """Targets of one step over all ranks, without padding."""
        return self._step * self.seq_len

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
        row_len = self._row_len or self.seq_len
        return self._micro_batch // sequences_per_row(row_len, self.seq_len), row_len

    def micro_batch(self, number: int) -> Batch:
        """This rank's micro-batch of that number, counted over the whole training."""
        return self._decoded(self._host_part(number), number)

    def require_sound(self) -> None:
        """Raise CorruptError if a micro-batch that a device decoded contradicts the format or its own tokens.

        Asked every 64 micro-batches, before the last one is handed out, and whenever the state is taken: it waits for
        the device. What the host decodes is checked before it is handed out.
        """
        number = None if self._decoder is None else self._decoder.first_fault()
        if number is None:
            return
        # the host finds it again, and names it
        for place in self.places(number):
            if (place.shard, place.member) not in self.skips:
                self._reader.read_member(place.shard, place.member)
        raise CorruptError(
            "a device decoded values that the host finds sound",
            where=f"micro-batch {number}, of {', '.join(self._reader.name_of(*p[:2]) for p in self.places(number))}",
            fix="decode on the host (train.decode: host), and test the device's memory",
        )

    def places(self, number: int) -> list[Place]:
        """Where the sequences of that micro-batch lie, as long as no member is damaged."""
        epoch, chosen = self._chosen(number)
        return [self.order.locate(epoch, index) for index in chosen]

    def names(self, number: int) -> list[str]:
        """The sequences of that micro-batch as errors name them, in its order, as long as no member is damaged."""
        return [f"{self._reader.name_of(*place[:2])}, sequence {place.row}" for place in self.places(number)]

    def state_dict(self) -> dict[str, Any]:
        """The number of sequences handed out over all ranks, what it counts, and what was skipped.

        Raises:
            CorruptError: as `require_sound`.
        """
        self.require_sound()
        return {"position": self._position, **self._counts(), "skipped": self.skips.as_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that many sequences.

        Raises:
            InputError: the state counts in another order, or stops within a round of these micro-batches.
        """
        expected = self._counts()
        found = {name: state.get(name) for name in expected}
        if found != expected:
            raise InputError(
                "a checkpoint of another data order",
                found={name: value for name, value in found.items() if value != expected[name]},
                expected={name: value for name, value in expected.items() if value != found[name]},
                fix="restore the settings and the data it was made with, or start over with --force",
            )
        if state["position"] % self.together:
            raise InputError(
                "a checkpoint within a step, which cannot be divided among these ranks",
                found=f"{state['position']} sequences",
                expected=f"a multiple of {self.together}, micro_batch x ranks",
                fix="resume from one between two steps, or with the micro-batch and the ranks it was made with",
            )
        self._position = int(state["position"])
        self.skips.load(state.get("skipped", {}))

    def _chosen(self, number: int) -> tuple[int, range]:
        """Epoch, and indices in its stream, of this rank's micro-batch of that number."""
        epoch, start = divmod(number * self.together, self.steps_per_epoch * self._step)
        return epoch, range(start + self._rank, start + self.together, self._world_size)

    def _require_divisible(self) -> None:
        per_row = sequences_per_row(self._row_len or self.seq_len, self.seq_len)
        if self._micro_batch % per_row:
            raise InputError(
                "a micro-batch does not fill its rows",
                found=f"{self._micro_batch} sequences, {per_row} a row",
                expected=f"a multiple of {per_row}",
                fix="use another micro-batch or row_len",
            )
        if self._step % self.together:
            raise InputError(
                "a step does not divide into micro-batches",
                found=f"{self._step} sequences, {self._micro_batch} a micro-batch on {self._world_size} ranks",
                expected=f"a multiple of {self.together}",
                fix="set micro_batch_sequences to a divisor of a rank's share of batch_sequences",
            )

    def _counts(self) -> dict[str, Any]:
        """All that decides which sequence a position is."""
        digests = "".join(shard.file.sha256 for shard in self._reader.shard_set.shards)
        return {
            "batch_sequences": self._step,
            "seed": self._seed,
            "lanes": self.order.lanes,
            "window": self.order.window,
            "shards": hashlib.sha256(digests.encode()).hexdigest(),
        }

    def _host_part(self, number: int) -> Batch | StoredBatch:
        """What threads make of a micro-batch: all of it, or its stored columns."""
        epoch, chosen = self._chosen(number)
        found = [self._find(epoch, index) for index in chosen]
        stored = [(block, row) for block, row in found if isinstance(block, StoredBlock)]
        if stored:
            return gather(stored, self._pin, self._context)
        decoded = [(*block, row) for block, row in found if not isinstance(block, StoredBlock)]
        batch = self._in_rows(collate(decoded, self._reader.codec.num_ids, self._heat, self._context))
        return pinned(batch) if self._pin else batch

    def _in_rows(self, batch: Batch) -> Batch:
        return batch if self._row_len is None else in_rows(batch, self._row_len)

    def _decoded(self, part: Batch | StoredBatch, number: int) -> Batch:
        if isinstance(part, Batch):
            return part
        assert self._decoder is not None, "stored columns are read for a device only"
        return self._in_rows(self._decoder.decode(part, number))

    def _find(self, epoch: int, index: int) -> tuple[Block, int]:
        """The sequence of that index, or where its member is damaged the next good one of its lane."""
        lane, lanes = index % self.order.lanes, self.order.lanes
        for further in range(self.order.lane_length(lane)):
            other = (index // lanes + further) % self.order.lane_length(lane)
            place = self.order.locate(epoch, other * lanes + lane)
            if (place.shard, place.member) in self.skips:
                continue
            try:
                return self.blocks.get((place.shard, place.member)), place.row
            except CorruptError as error:
                lost = self._reader.shard_set.shards[place.shard].members.num_sequences[place.member]
                self.skips.note((place.shard, place.member), self._reader.name_of(*place[:2]), lost, error)
        raise CorruptError("no sound sequence is left in a lane of the order", where=self._reader.name_of(0, 0))

    def _read(self, key: tuple[int, int]) -> Block:
        if self._decoder is not None:
            return self._reader.read_stored(*key)
        return self._reader.read_member(*key)


def heat_of(codec: Codec, capture: float, temperature: float) -> Heat | None:
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
    return Heat(number, codec.powers[number])


def pinned(batch: Batch) -> Batch:
    """The same batch in page-locked memory."""
    tensors: list[Any] = [None if v is None else v.pin_memory() for v in vars(batch).values()]
    return Batch(*tensors)


def _steps(reader: ShardReader, step: int, most: int, max_tokens: int | None) -> int:
    """Steps of a training.

    Raises:
        InputError: not even one.
    """
    shard_set = reader.shard_set
    if not most:
        raise InputError(
            "too few sequences for one step",
            found=f"{shard_set.num_sequences} sequences",
            expected=f"at least {step}",
            fix="give the corpus more text or lower the batch",
        )
    steps = most if max_tokens is None else min(most, max_tokens // (step * shard_set.seq_len))
    if not steps:
        raise InputError(
            "not enough data for one step of training",
            where="max_tokens",
            found=max_tokens,
            expected=f"at least {step * shard_set.seq_len}, the targets of batch_sequences",
        )
    return steps
