"""Makes the units of an alignment: the process that claims a unit reads one shard of the given cache and writes one.

A unit is finished when its record, `work/aligned/000000.json`, exists and the shard's file has the digest in it. Memory
holds one shard at a time: its text, a few numbers per target, and 8 bytes for each id that is projected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from capgap.pipeline.align.projection import BothTokens
from capgap.pipeline.align.shard import ShardCounts, StudentFormat, align_shard
from capgap.pipeline.align.stream import read_stream
from capgap.pipeline.align.token_bytes import TextTokenizer
from capgap.pipeline.models.text import TOKENIZER_FOLDER
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.claims import Claims
from capgap.pipeline.stage.context import Slice
from capgap.pipeline.stage.progress import advance_within, progress
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store import Block, Codec, ShardReader, ShardWriter, check_alignment, split_blocks
from capgap.pipeline.store.alignment import StoredError
from capgap.pipeline.store.codec import CHUNKS
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.base import Record
from capgap.schemas.facts import CacheFacts, TokenizerFacts, heldout_set
from capgap.schemas.manifest import ShardEntry, ShardSet
from capgap.schemas.records import ChunkTargets, Sequences, Targets
from capgap.schemas.run_cache import RecordingName

ALIGNED_FOLDER = "aligned"
SIDECARS_FOLDER = "shards"
CHUNKS_SET: RecordingName = "chunks"


class AlignedUnit(Record):
    """The record of a finished unit."""

    sha256: str
    """SHA-256 digest of the shard's file."""

    counts: ShardCounts
    """Counts of what the shard holds."""


@dataclass(frozen=True)
class AlignJob:
    """Everything that a process must know to make units of one alignment.

    Attributes:
        location: folder or URL of the given cache.
        source: shards of the given cache: first those that students train on, then the held-out ones.
        num_training: number of shards that students train on.
        recording: the recording of the given cache that is aligned.
        facts: the facts of the given cache.
        teacher: folder of the given cache's tokenizer.
        folder: folder of the align stage, which holds the student's tokenizer.
        work: the stage's work folder.
        tokenizer: the facts of the student's tokenizer.
        bos_ids: ids with which the student's documents begin.
        seq_len: number of targets per sequence of the student.
        min_border_probability: the setting `align.min_border_probability`.
        projected_top_k: the setting `align.projected_top_k`.
    """

    location: Path | str
    source: ShardSet
    num_training: int
    recording: RecordingName
    facts: CacheFacts
    teacher: Path
    folder: Path
    work: Path
    tokenizer: TokenizerFacts
    bos_ids: tuple[int, ...]
    seq_len: int
    min_border_probability: float
    projected_top_k: int = 0

    @property
    def units(self) -> UnitNotes:
        """The notes of finished units in the work folder."""
        return UnitNotes(self.folder, self.work, ALIGNED_FOLDER, len(self.source.shards))


class ChunkAligner:
    """Makes and checks the units of a job."""

    def __init__(self, job: AlignJob) -> None:
        self.job = job
        self._reader = ShardReader(job.location, job.source)
        codec = Codec(CHUNKS, job.seq_len, job.tokenizer.vocab_size, job.projected_top_k)
        (job.work / ALIGNED_FOLDER).mkdir(parents=True, exist_ok=True)
        names: tuple[str, ...] = (CHUNKS_SET, heldout_set(CHUNKS_SET))
        self._writers = [ShardWriter(job.folder, job.work / SIDECARS_FOLDER, name, codec) for name in names]

    @cached_property
    def _teacher(self) -> TextTokenizer:
        return TextTokenizer.of(
            load_tokenizer(self.job.teacher),
            self.job.facts.tokenizer.vocab_size,
            f"the tokenizer of {self.job.location}",
        )

    @cached_property
    def _student(self) -> StudentFormat:
        job, folder = self.job, self.job.folder / TOKENIZER_FOLDER
        tokenizer = TextTokenizer.of(load_tokenizer(folder), job.tokenizer.vocab_size, str(folder))
        return StudentFormat(tokenizer, job.tokenizer.eos_id, job.bos_ids, job.seq_len, job.min_border_probability)

    @cached_property
    def _both(self) -> BothTokens:
        """The teacher's vocabulary compared with the student's."""
        student = self._student
        return BothTokens.of(self._teacher, self.job.facts.tokenizer.eos_id, student.tokenizer, student.eos_id)

    @cached_property
    def _shared(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether the student's vocabulary has the bytes of each of the teacher's ids [V]."""
        mine, theirs = self._teacher.table, self._student.tokenizer.table.texts
        return np.array([mine.bytes_of(token) in theirs for token in range(len(mine.length_V))], np.bool_)

    def warm_up(self) -> None:
        """Load both tokenizers and make their tables now, instead of with the first unit."""
        assert self._student is not None and self._teacher.table.order is not None and self._shared is not None
        assert self._both is not None

    def finished(self, unit: int) -> tuple[ShardEntry, AlignedUnit] | None:
        """Return a unit's shard and record, or None if the unit is not whole; its file is read and digested."""
        record = read_sidecar(self.job.units.path(unit), AlignedUnit)
        writer, number = self._writer_of(unit)
        entry = None if record is None else writer.finished(number)
        if record is None or entry is None or entry.file.sha256 != record.sha256:
            return None
        return entry, record

    def make(self, unit: int) -> tuple[ShardEntry, AlignedUnit]:
        """Make a unit unless it is finished, and return its shard and record.

        Raises:
            InputError: a document of the shard cannot be aligned, for the reasons that `read_stream` and `align_shard`
                name.
            CorruptError: the shard is damaged.
            OSError: the disk is full, or the folder cannot be written.
        """
        found = self.finished(unit)
        if found is not None:
            return found
        job = self.job
        note = job.units.path(unit)
        note.unlink(missing_ok=True)
        stream = read_stream(
            self._blocks_of(unit),
            job.facts,
            self._reader.codec.num_ids,
            self._teacher,
            self._shared,
            job.projected_top_k,
        )
        both = self._both if job.projected_top_k else None
        sequences, targets, counts = align_shard(stream, self._teacher, self._student, both)
        writer, number = self._writer_of(unit)
        blocks = _blocks(sequences, targets, f"{CHUNKS_SET}, shard {unit}", self._reader.codec.error)
        entry = writer.write(number, blocks)
        record = AlignedUnit(sha256=entry.file.sha256, counts=counts)
        write_sidecar(note, record)
        return entry, record

    def shard_set(self, entries: list[ShardEntry]) -> ShardSet:
        """Return the manifest's description of the given shards."""
        return self._writers[0].shard_set(entries)

    def _writer_of(self, unit: int) -> tuple[ShardWriter, int]:
        number = unit - self.job.num_training
        return (self._writers[0], unit) if number < 0 else (self._writers[1], number)

    def _blocks_of(self, unit: int) -> Iterator[tuple[Sequences, Targets | None]]:
        for member in range(len(self.job.source.shards[unit].members)):
            block = self._reader.read_member(unit, member)
            yield block
            advance_within(len(block[0]))


def make_units(job: AlignJob, part: Slice) -> None:
    """Make the units of the slice that are neither finished nor claimed by another process.

    Raises:
        CapgapError, OSError: a unit cannot be made, for the reasons that `ChunkAligner.make` names.
    """
    maker, claims = ChunkAligner(job), Claims(job.units, part)
    made, sizes = job.units.made(), [shard.num_sequences for shard in job.source.shards]
    wanted = [unit for unit in range(job.units.total) if part.has(unit)]
    title = "align" if part == Slice(None) else f"align: slice {part}"
    done = sum(sizes[unit] for unit in wanted if unit in made)
    try:
        with progress(title, sum(sizes[unit] for unit in wanted), "sequences", done) as meter:
            for unit in claims.take_each():
                maker.make(unit)
                claims.release(unit)
                meter.advance(sizes[unit], tokens=sizes[unit] * job.source.seq_len)
    finally:
        claims.close()


def _blocks(sequences: Sequences, targets: ChunkTargets, where: str, error: StoredError) -> Iterator[Block]:
    start = 0
    for part in split_blocks(sequences):
        rows = slice(start, start + len(part))
        some = targets.part(rows)
        check_alignment(part, some, 0, where, error)
        start = rows.stop
        yield Block(part, some)
