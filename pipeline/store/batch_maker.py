"""Micro-batches are made from members, which are located, decoded by the host or by a device, and collated.

    places --BlockCache--> blocks --collate--> Batch                                            the host decodes
    places --BlockCache--> stored columns --gather, one copy--> DeviceDecoder --> Batch         a device decodes

Threads do the host's part of several micro-batches at once; the consumer's thread starts the device's part.
"""

from __future__ import annotations

import numpy as np
import torch

from capgap.pipeline.store.batch import Batch, Sample, collate
from capgap.pipeline.store.blocks import BlockCache, LoadedBlock
from capgap.pipeline.store.device import DeviceDecoder
from capgap.pipeline.store.loader_settings import LoaderSettings, WriterLogprobs
from capgap.pipeline.store.order import Place
from capgap.pipeline.store.reader import ShardReader
from capgap.pipeline.store.rows import in_rows
from capgap.pipeline.store.skips import Skips
from capgap.pipeline.store.stored import StoredBlock
from capgap.pipeline.store.stored_batch import StoredBatch, gather
from capgap.pipeline.store.stream import Stream
from capgap.schemas.errors import CorruptError
from capgap.schemas.records import SampledTargets, TopkTargets


class BatchMaker:
    """Makes the micro-batches of a stream.

    Args:
        reader: Reader of the shards.
        stream: Stream that says which sequences each micro-batch holds.
        settings: Settings of the loader.

    Attributes:
        skips: The damaged members that were skipped.
        blocks: Cache of the blocks that are held in memory.
    """

    def __init__(self, reader: ShardReader, stream: Stream, settings: LoaderSettings) -> None:
        self._reader, self._stream, self._settings = reader, stream, settings
        shards = reader.shard_set.shards
        lost = [shard for shard in shards if shard.file.path in reader.quarantined]
        excused = {reader.place.name_of(shard.file): len(shard.members) for shard in lost}
        self.skips = Skips(len(stream.order), settings.on_corrupt, excused)
        once = stream.num_steps <= stream.steps_per_epoch
        self.blocks = BlockCache[tuple[int, int]](self._read, settings.max_block_bytes, once)
        self._pin = torch.cuda.is_available() if settings.pin is None else settings.pin
        self._decoder = None
        if settings.decode_on is not None:
            self._decoder = DeviceDecoder(reader.codec, settings.decode_on, settings.target_temperature)

    def host_part(self, number: int) -> Batch | StoredBatch:
        """Make the host's part of a micro-batch: the whole batch, or its stored columns if a device decodes.

        Raises:
            CorruptError: A member is damaged and may not be skipped.
        """
        epoch, chosen = self._stream.chosen(number)
        found = [self._find(epoch, index) for index in chosen]
        stored = [(block, place.row) for block, place in found if isinstance(block, StoredBlock)]
        if stored:
            return gather(stored, self._reader.codec.seq_len, self._pin, self._settings.context)
        decoded = [(*block, place.row) for block, place in found if not isinstance(block, StoredBlock)]
        settings = self._settings
        batch = collate(decoded, self._reader.codec.num_ids, settings.target_temperature, settings.context)
        if settings.writer_logprobs is not None:
            self._add_logprobs(batch, decoded, [place for _, place in found], settings.writer_logprobs)
        batch = self._in_rows(batch)
        return pinned(batch) if self._pin else batch

    def finish(self, part: Batch | StoredBatch, number: int) -> Batch:
        """Turn the host's part of micro-batch `number` into a batch; stored columns are decoded on the device."""
        if isinstance(part, Batch):
            return part
        assert self._decoder is not None, "stored columns are read for a device only"
        return self._in_rows(self._decoder.decode(part, number))

    def require_sound(self) -> None:
        """Raise CorruptError if a micro-batch that a device decoded contradicts the format or its own tokens.

        This waits for the device. Batches that the host decodes are checked before they are handed out.
        """
        number = None if self._decoder is None else self._decoder.first_fault()
        if number is None:
            return
        epoch, chosen = self._stream.chosen(number)
        places = [self._find(epoch, index)[1] for index in chosen]
        # the host's own check fails at the same fault, and its error names the member
        for place in places:
            self._reader.read_member(place.shard, place.member)
        raise CorruptError(
            "a device decoded values that the host finds sound",
            where=f"micro-batch {number}, of {', '.join(self._reader.name_of(*place[:2]) for place in places)}",
            fix="decode on the host (train.decode: host), and test the device's memory",
        )

    def _in_rows(self, batch: Batch) -> Batch:
        return batch if self._settings.row_len is None else in_rows(batch, self._settings.row_len)

    def _add_logprobs(
        self, batch: Batch, samples: list[Sample], places: list[Place], writer_logprobs: WriterLogprobs
    ) -> None:
        shards = self._reader.shard_set.shards
        rows = [(at.shard, sum(shards[at.shard].members.num_sequences[: at.member]) + at.row) for at in places]
        targets = [(targets, row) for _, targets, row in samples if isinstance(targets, SampledTargets | TopkTargets)]
        batch.writer_logprobs_N = torch.from_numpy(np.concatenate([writer_logprobs(*one) for one in rows]))
        each_teacher = [one.label_logprobs_BL[row] for one, row in targets]
        batch.teacher_logprobs_N = torch.from_numpy(np.concatenate(each_teacher))

    def _find(self, epoch: int, index: int) -> tuple[LoadedBlock, Place]:
        """Return the block and place of a sequence, or of the first sound substitute if its member is damaged."""
        shards = self._reader.shard_set.shards
        for place in self._stream.order.candidates(epoch, index):
            member = (place.shard, place.member)
            if member in self.skips:
                continue
            try:
                return self.blocks.get(member), place
            except CorruptError as error:
                lost = shards[place.shard].members.num_sequences[place.member]
                self.skips.note(member, self._reader.name_of(*member), lost, error)
        raise CorruptError(
            "no sound sequence is left",
            where=self._reader.place.name_of(shards[0].file),
            found=f"damage or quarantine in all of {len(shards)} shards",
            fix="run the stage that wrote them again",
        )

    def _read(self, key: tuple[int, int]) -> LoadedBlock:
        if self._decoder is not None:
            return self._reader.read_stored(*key)
        return self._reader.read_member(*key)


def pinned(batch: Batch) -> Batch:
    """Return a copy of the batch in page-locked memory."""
    return batch.each(lambda tensor: tensor.pin_memory())
