"""Makes one unit of the corpus: its part of the sources becomes shards of its own, in any process.

    documents --digest of the text--> repeated? split? --batch--> tokens --packer of the split--> shards --> record

A unit depends only on its part of the sources, so it may be made any number of times. It is finished when its record,
`work/units/000000.json`, exists and every shard has the digest that the record names: the record is removed before a
shard is touched, and written after all shards are whole. Memory holds a batch of documents, the digests of the unit's
texts, and a shard of each split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.encode import Encoder
from capgap.pipeline.corpus.limits import Limits
from capgap.pipeline.corpus.listing import ListedFile, Listing
from capgap.pipeline.corpus.repeated import earlier_digests
from capgap.pipeline.corpus.sources import Document, read_documents_of
from capgap.pipeline.corpus.split import SPLITS, Split, split_of
from capgap.pipeline.corpus.split_out import SplitOut
from capgap.pipeline.corpus.unit_record import UnitRecord
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store import ShardWriter
from capgap.pipeline.store.codec import SEQUENCES, Codec
from capgap.pipeline.store.files import atomic_file, sha256_of
from capgap.pipeline.store.sidecars import read_sidecar, write_sidecar
from capgap.schemas.errors import BadRecordError, InputError
from capgap.schemas.facts import TokenizerFacts
from capgap.schemas.manifest import ShardEntry, ShardSet
from capgap.schemas.run_corpus import CorpusSettings

UNITS_FOLDER, COUNTS_FOLDER = "units", "counts"
_BATCH_DOCUMENTS, _BATCH_BYTES = 64, 1 << 20

Advance = Callable[[int, int, int], None]
"""Called with the numbers of bytes of text, documents and tokens that were made since its last call."""

Changed = dict[int, str]
"""The files of a unit that are gone or changed: the error's message by the number of the file."""

_T = TypeVar("_T")


class ChangedFileError(InputError):
    """A file is gone or changed, so that what was read of it may be of another version, or of two."""

    file = -1
    """Number of the file in the listing."""


@dataclass(frozen=True)
class CorpusJob:
    """Everything that a process must know to make units of one corpus; it can be pickled and sent to any machine.

    Attributes:
        settings: the settings of the corpus.
        listing: the files and units that are read.
        folder: the folder of the corpus.
        work: the stage's work folder.
        tokenizer: folder or id from which the tokenizer is loaded.
        texts: the file with which texts are encoded; None if only transformers can encode them.
        facts: the facts of the tokenizer.
        bos_ids: ids with which every document begins.
    """

    settings: CorpusSettings
    listing: Listing
    folder: Path
    work: Path
    tokenizer: str
    texts: Path | None
    facts: TokenizerFacts
    bos_ids: tuple[int, ...]

    @property
    def units(self) -> UnitNotes:
        """The notes of finished units in the work folder."""
        return UnitNotes(self.folder, self.work, UNITS_FOLDER, len(self.listing.units))

    def writer(self, unit: int, split: Split) -> ShardWriter:
        """Return the writer of a unit's shards of one split; with several units, shard names hold the unit's number."""
        name = split if len(self.listing.units) == 1 else f"{split}-{unit:05d}"
        codec = Codec(SEQUENCES, self.settings.seq_len, self.facts.vocab_size)
        return ShardWriter(self.folder, self.work / "shards", name, codec)

    def shard_set(self, split: Split, shards: list[ShardEntry]) -> ShardSet:
        """Return the manifest's description of the shards of a split."""
        return self.writer(0, split).shard_set(shards)

    def record(self, unit: int) -> UnitRecord | None:
        """Return the record of a unit, or None if it is not finished; its shards are not checked."""
        return read_sidecar(self.units.path(unit), UnitRecord)

    def counts(self, unit: int) -> npt.NDArray[np.int64]:
        """Return how often each split of a finished unit holds each token id [S, V], int64."""
        with np.load(self.work / COUNTS_FOLDER / f"{unit:06d}.npz") as stored:
            counts_SV: npt.NDArray[np.int64] = stored["counts"]
            return counts_SV


class UnitMaker:
    """Makes and checks units of a corpus."""

    def __init__(self, job: CorpusJob) -> None:
        self.job = job
        self._limits = Limits(job.settings, job.listing)
        for name in (UNITS_FOLDER, COUNTS_FOLDER):
            (job.work / name).mkdir(parents=True, exist_ok=True)

    def require_whole(self, unit: int) -> bool:
        """Return whether a unit is finished and all its files are whole; if not, remove its record."""
        record = self.job.record(unit)
        entries = [] if record is None else [entry for shards in record.shards.values() for entry in shards]
        paths = [self.job.folder / entry.file.path for entry in entries]
        is_whole = record is not None and (self.job.work / COUNTS_FOLDER / f"{unit:06d}.npz").is_file()
        is_whole &= all(path.is_file() for path in paths) and all(
            sha256_of(path) == entry.file.sha256 for path, entry in zip(paths, entries, strict=True)
        )
        if not is_whole:
            self.job.units.path(unit).unlink(missing_ok=True)
        return is_whole

    def make(self, unit: int, advance: Advance) -> UnitRecord:
        """Make a unit, and replace whatever exists of it.

        Args:
            unit: number of the unit.
            advance: called with the progress.

        Raises:
            InputError: a file is gone, changed or damaged, and `corpus.on_damaged_file` is `stop`; or a document is too
                long and `corpus.long_documents` is `refuse`.
            BadRecordError: a record cannot be used, and `corpus.on_bad_record` is `stop`.
            OSError: the disk is full, or the folder cannot be written.
        """
        job = self.job
        job.units.path(unit).unlink(missing_ok=True)
        full = self._limits.full(job.record, unit)
        record, counts_SV = without_changed(lambda changed: self._made(unit, full, advance, changed))
        with atomic_file(job.work / COUNTS_FOLDER / f"{unit:06d}.npz") as file:
            np.savez_compressed(file, counts=counts_SV)
        write_sidecar(job.units.path(unit), record)
        return record

    def _made(
        self, unit: int, full: frozenset[Split], advance: Advance, changed: Changed
    ) -> tuple[UnitRecord, npt.NDArray[np.int64]]:
        making = _Making(self.job, unit, full, self._encoder, advance, changed)
        return making.make(), making.counts_SV

    @cached_property
    def _encoder(self) -> Encoder:
        job = self.job
        return Encoder(job.settings, job.tokenizer, job.texts, job.bos_ids)


@dataclass(frozen=True)
class _Read:
    """A document that is read and not encoded yet."""

    document: Document
    split: Split
    source: int
    num_bytes: int


class _Making:
    """The state of a unit while it is made."""

    def __init__(
        self,
        job: CorpusJob,
        unit: int,
        full: frozenset[Split],
        encoder: Encoder,
        advance: Advance,
        changed: Changed,
    ) -> None:
        self._job, self._unit, self._encoder, self._advance = job, unit, encoder, advance
        self._changed = changed
        settings = job.settings
        self._bad = BadRecords("corpus", settings.on_bad_record, settings.max_bad_fraction, num_named=0)
        self._outs = {
            split: SplitOut(settings, job.writer(unit, split), split, job.facts, job.bos_ids) for split in SPLITS
        }
        # splits that need no further documents
        self._full = set(full)
        self._num_repeated = 0
        self._damaged: list[str] = []

    @property
    def counts_SV(self) -> npt.NDArray[np.int64]:  # noqa: N802  # a field in all but name
        """How often the shards of each split hold each token id [S, V], int64."""
        return np.stack([self._outs[split].counts_V for split in SPLITS])

    def make(self) -> UnitRecord:
        """Read the documents, write the shards, and return the unit's record."""
        batch: list[_Read] = []
        num_bytes = 0
        for one in self._each_document():
            batch.append(one)
            num_bytes += one.num_bytes
            if len(batch) == _BATCH_DOCUMENTS or num_bytes >= _BATCH_BYTES:
                self._encode(batch)
                batch, num_bytes = [], 0
            if len(self._full) == len(SPLITS):
                break
        self._encode(batch)
        for out in self._outs.values():
            out.end()
        return UnitRecord(
            shards={split: tuple(out.shards) for split, out in self._outs.items()},
            shard_counts={split: tuple(out.shard_counts) for split, out in self._outs.items()},
            counts={split: out.counts for split, out in self._outs.items()},
            num_repeated=self._num_repeated,
            bad=self._bad.tally,
            damaged=(*self._changed.values(), *self._damaged),
        )

    def _each_document(self) -> Iterator[_Read]:
        settings = self._job.settings
        if len(self._full) == len(SPLITS):
            return
        seen = earlier_digests(self._job.work, self._unit) if settings.dedup == "all" else set()
        documents = taken_documents(self._job, self._unit, self._bad, self._damaged, self._changed)
        for document, source, digest in documents:
            if digest in seen:
                self._num_repeated += 1
                continue
            seen.add(digest)
            split = split_of(document.text, settings.teacher_fraction, settings.heldout_fraction)
            if split not in self._full:
                yield _Read(document, split, source, len(document.text.encode()))

    def _encode(self, batch: list[_Read]) -> None:
        found = self._encoder.encode([one.document for one in batch], self._bad)
        num_bytes = num_tokens = 0
        for one, encoded in zip(batch, found, strict=True):
            num_bytes += one.num_bytes
            if encoded is not None and one.split not in self._full:
                num_tokens += self._outs[one.split].add(one.source, encoded)
                if self._outs[one.split].is_full:
                    self._full.add(one.split)
        self._advance(num_bytes, len(batch), num_tokens)


def without_changed(make: Callable[[Changed], _T]) -> _T:
    """Return what `make` makes of a unit's documents; where a file changes meanwhile, it is made without that file.

    Args:
        make: called with the files that are left out, until none of the others changes.
    """
    changed: Changed = {}
    while True:
        try:
            return make(changed)
        except ChangedFileError as error:
            changed[error.file] = str(error)


def taken_documents(
    job: CorpusJob, unit: int, bad: BadRecords, damaged: list[str], changed: Changed
) -> Iterator[tuple[Document, int, bytes]]:
    """Yield those documents of a unit that the weight of their source takes, each with its source and its digest.

    Arguments and errors are those of `documents_of`.
    """
    shares = job.listing.shares
    for document, source in documents_of(job, unit, bad, damaged, changed):
        digest = digest_of(document.text)
        if int.from_bytes(digest[8:], "big") < shares[source] * 2**64:
            yield document, source, digest


def documents_of(
    job: CorpusJob, unit: int, bad: BadRecords, damaged: list[str], changed: Changed
) -> Iterator[tuple[Document, int]]:
    """Yield the documents of a unit, each with the number of its source.

    Args:
        job: the corpus.
        unit: number of the unit.
        bad: what becomes of records that cannot be used.
        damaged: list to which the error of each damaged file is added, if `corpus.on_damaged_file` is `skip`.
        changed: the files that are left out.

    Raises:
        InputError: a file is gone, changed or damaged, and `corpus.on_damaged_file` is `stop`.
        ChangedFileError: a file is gone or changed, and `corpus.on_damaged_file` is `skip`.
        BadRecordError: a record cannot be used, and `bad` stops at such a record.
    """
    settings, listing = job.settings, job.listing
    sources = settings.named_sources
    for part in listing.units[unit]:
        if part.file in changed:
            continue
        file = listing.files[part.file]
        text_field = sources[file.source][1].text_field or settings.text_field
        try:
            file.require_same()
            for document in read_documents_of(file.place, part.span, text_field, settings.messages_field, bad):
                yield document, file.source
            # a file that changed while it was read may have given text of both versions
            file.require_same()
        except BadRecordError:
            raise
        except InputError as error:
            if settings.on_damaged_file == "stop":
                raise
            _require_unchanged(part.file, file)
            damaged.append(str(error))


def _require_unchanged(number: int, file: ListedFile) -> None:
    try:
        file.require_same()
    except InputError as error:
        changed = ChangedFileError(
            error.what, where=error.where, found=error.found, expected=error.expected, fix=error.fix
        )
        changed.file = number
        raise changed from None


def digest_of(text: str) -> bytes:
    """Return the digest by which equal texts are recognized, 16 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
