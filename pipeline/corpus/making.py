"""Makes the units of a corpus: in one process, several of this machine, slices on many machines, or on Ray.

Every process claims a unit before it makes it. With `corpus.dedup: all`, the processes first compute the digests of all
units together, and each waits until all digests are there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.repeated import DIGESTED_FOLDER, DIGESTS_FOLDER, find_repeated, is_found, write_digests
from capgap.pipeline.corpus.unit import Changed, CorpusJob, UnitMaker, taken_documents, without_changed
from capgap.pipeline.corpus.unit_record import UnitRecord
from capgap.pipeline.stage.claims import Claims
from capgap.pipeline.stage.context import Slice
from capgap.pipeline.stage.progress import Meter, progress
from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store.locks import held_alone

_POLL_S = 0.2
ANY = Slice(None)


def make_slice(job: CorpusJob, part: Slice) -> None:
    """Make the units of the slice that are neither finished nor claimed by another process.

    Raises:
        CapgapError, OSError: a unit cannot be made, for the reasons that `UnitMaker.make` names.
    """
    if job.settings.dedup == "all" and not job.units.all_made():
        find_all_repeated(job)
    wanted = [unit for unit in range(job.units.total) if part.has(unit)]
    maker, claims = UnitMaker(job), Claims(job.units, part)
    try:
        with unit_meter(job, "corpus" if part == ANY else f"corpus: slice {part}", wanted) as meter:
            for unit in claims.take_each():
                maker.make(unit, meter.begin(unit))
                meter.end(unit)
                claims.release(unit)
    finally:
        claims.close()


def make_here(job: CorpusJob) -> None:
    """Make units as one of several processes of this machine."""
    # the processes already share the cores; threads of the tokenizer would only compete for them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    make_slice(job, ANY)


class UnitMeter:
    """Counts the bytes, documents and tokens of units, also while a unit is being made."""

    def __init__(self, job: CorpusJob, meter: Meter, made: set[int]) -> None:
        self._sizes, self._meter, self._made = job.listing.unit_bytes, meter, set(made)
        self._job, self._num_documents, self._left = job, 0, 0

    def begin(self, unit: int) -> UnitMeter:
        """Begin a unit, and return the function to call with what is made of it."""
        self._left = self._sizes[unit]
        return self

    def __call__(self, num_bytes: int, num_documents: int, num_tokens: int) -> None:
        """Count bytes, documents and tokens of the unit that was begun last."""
        step = min(num_bytes, self._left)
        self._left -= step
        self._advance(step, num_documents, num_tokens)

    def end(self, unit: int) -> None:
        """Count the unit as finished."""
        self._advance(self._left, 0, 0)
        self._made.add(unit)

    def look(self) -> None:
        """Count the units that other processes have finished since the last call."""
        for unit in self._job.units.made() - self._made:
            record = self._job.record(unit)
            self._made.add(unit)
            self._advance(self._sizes[unit], *((0, 0) if record is None else _amounts(record)))

    def _advance(self, num_bytes: int, num_documents: int, num_tokens: int) -> None:
        self._num_documents += num_documents
        self._meter.advance(num_bytes, num_tokens, f"{self._num_documents:,} documents")


@contextmanager
def unit_meter(job: CorpusJob, title: str, wanted: list[int]) -> Iterator[UnitMeter]:
    """Show the progress over the wanted units, and yield the meter that counts it."""
    sizes, made = job.listing.unit_bytes, job.units.made()
    done = sum(sizes[unit] for unit in wanted if unit in made)
    with progress(title, sum(sizes[unit] for unit in wanted), "bytes", done) as meter:
        yield UnitMeter(job, meter, made)


def _amounts(record: UnitRecord) -> tuple[int, int]:
    counts = record.counts.values()
    return sum(one.num_documents for one in counts), sum(one.num_tokens for one in counts)


def find_all_repeated(job: CorpusJob) -> None:
    """Compute the digests of every unit, together with the other processes, and find the repeated documents once."""
    notes = UnitNotes(job.folder, job.work, DIGESTED_FOLDER, job.units.total)
    for name in (DIGESTS_FOLDER, notes.name):
        (job.work / name).mkdir(exist_ok=True)
    claims = Claims(notes, ANY)
    try:
        while not is_found(job.work) and not notes.is_over():
            for unit in claims.take_each():
                write_digests(notes, unit, without_changed(partial(_digests_of, job, unit)))
                claims.release(unit)
            if not notes.all_made():
                # other processes hold the rest; the claim of a process that is killed becomes free again
                time.sleep(_POLL_S)
                continue
            with held_alone(job.work / "repeated.lock"):
                if not is_found(job.work):
                    find_repeated(job.work, notes.total)
    finally:
        claims.close()


def _digests_of(job: CorpusJob, unit: int, changed: Changed) -> list[bytes]:
    bad = BadRecords("corpus", job.settings.on_bad_record, job.settings.max_bad_fraction, num_named=0)
    return [digest for _, _, digest in taken_documents(job, unit, bad, [], changed)]
