"""Texts that were there before, over all units: by digests on disk, in bounded memory (`corpus.dedup: all`).

    each unit: the digest of each document --> work/digests/000000.npy           by whoever claims the unit
    all units, a bucket of digests at a time --> work/repeated/000000.u32        by one process, once
    each unit again: the documents with those numbers are left out

Of equal texts the first stays, in the order of the units and of the documents in them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store.files import atomic_file, write_atomically

DIGESTS_FOLDER, _REPEATED_FOLDER = "digests", "repeated"
_DONE_NAME = "repeated.done"
# A bucket is sorted in memory: 16 bytes of digest, 8 of its place, and as much again for the order.
_BUCKET_DOCUMENTS = 1 << 21

Digests = npt.NDArray[np.uint64]


class Repeated:
    """The numbers of a unit's documents that are left out."""

    def __init__(self, work: Path, unit: int) -> None:
        path = work / _REPEATED_FOLDER / f"{unit:06d}.u32"
        self._numbers = set(np.fromfile(path, "<u4").tolist()) if path.is_file() else set()

    def has(self, number: int) -> bool:
        """Whether the text of that document was there before."""
        return number in self._numbers


def write_digests(notes: UnitNotes, unit: int, digests: list[bytes]) -> None:
    """Keep the digests of a unit's documents, 16 bytes each, in their order."""
    with atomic_file(notes.work / DIGESTS_FOLDER / f"{unit:06d}.npy") as file:
        np.save(file, np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64))
    write_atomically(notes.path(unit), "{}")


def is_found(work: Path) -> bool:
    """Whether it is known which documents are repeated."""
    return (work / _DONE_NAME).is_file()


def find_repeated(work: Path, num_units: int, bucket_documents: int = _BUCKET_DOCUMENTS) -> None:
    """Write down which documents of each unit are repeated; all digests must be there."""
    folder = work / _REPEATED_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_documents = sum(len(_digests(work, unit)) for unit in range(num_units))
    num_buckets = max(1, -(-num_documents // bucket_documents))
    for bucket in range(num_buckets):
        found = _repeated_in(work, num_units, bucket, num_buckets)
        units = found >> np.uint64(32)
        for unit in np.unique(units):
            numbers = np.sort(found[units == unit] & np.uint64(0xFFFFFFFF))
            with (folder / f"{int(unit):06d}.u32").open("ab") as file:
                file.write(numbers.astype("<u4").tobytes())
    write_atomically(work / _DONE_NAME, "")


def _repeated_in(work: Path, num_units: int, bucket: int, num_buckets: int) -> npt.NDArray[np.uint64]:
    """Unit and number of the documents of one bucket that were there before: the unit in the upper 32 bits."""
    parts, places = [], []
    for unit in range(num_units):
        digests_D2 = _digests(work, unit)
        numbers = np.flatnonzero(digests_D2[:, 0] % np.uint64(num_buckets) == bucket)
        parts.append(np.asarray(digests_D2[numbers]))
        places.append(numbers.astype(np.uint64) | np.uint64(unit << 32))
    digests_D2, place_D = np.concatenate(parts), np.concatenate(places)
    order = np.lexsort((place_D, digests_D2[:, 1], digests_D2[:, 0]))
    sorted_D2 = digests_D2[order]
    is_again = np.zeros(len(order), np.bool_)
    is_again[1:] = (sorted_D2[1:] == sorted_D2[:-1]).all(axis=1)
    return place_D[order[is_again]]


def _digests(work: Path, unit: int) -> Digests:
    digests_D2: Digests = np.load(work / DIGESTS_FOLDER / f"{unit:06d}.npy", mmap_mode="r")
    return digests_D2
