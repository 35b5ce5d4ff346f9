"""Finds repeated texts across all units, by digests on disk and in bounded memory (`corpus.dedup: all`).

    each unit: the digest of each document --> work/digests/000000.npy           by the process that claims the unit
    all units, one bucket of digests at a time --> work/repeated/000000.u32      by one process, once
    each unit again: its repeated documents, which the second file numbers, are left out

Of equal texts the first one stays, in the order of the units and of the documents within each.
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
# A bucket is sorted in memory. A document takes 16 bytes of digest, 8 bytes of place, and as much again for the order.
_BUCKET_DOCUMENTS = 1 << 21

Digests = npt.NDArray[np.uint64]


class Repeated:
    """The repeated documents of one unit, which are left out."""

    def __init__(self, work: Path, unit: int) -> None:
        path = work / _REPEATED_FOLDER / f"{unit:06d}.u32"
        self._numbers = set(np.fromfile(path, "<u4").tolist()) if path.is_file() else set()

    def has(self, number: int) -> bool:
        """Return whether the text of the document with this number in the unit occurs before it in the corpus."""
        return number in self._numbers


def write_digests(notes: UnitNotes, unit: int, digests: list[bytes]) -> None:
    """Write the digests of a unit's documents, 16 bytes each, in the order of the documents, and note the unit."""
    with atomic_file(notes.work / DIGESTS_FOLDER / f"{unit:06d}.npy") as file:
        np.save(file, np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64))
    write_atomically(notes.path(unit), "{}")


def is_found(work: Path) -> bool:
    """Return whether the repeated documents of all units have been found."""
    return (work / _DONE_NAME).is_file()


def find_repeated(work: Path, num_units: int, bucket_documents: int = _BUCKET_DOCUMENTS) -> None:
    """Find the repeated documents of all units, and write their numbers, unit by unit, into the work folder.

    Args:
        work: the work folder of the corpus, which must hold the digests of every unit.
        num_units: number of units.
        bucket_documents: number of digests that are sorted in memory at once, on average.
    """
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
    """Return the repeated documents of one bucket [D], uint64: the unit in the upper 32 bits, the number below."""
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
