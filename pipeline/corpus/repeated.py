"""Finds repeated texts across all units, by digests on disk and in bounded memory (`corpus.dedup: all`).

    each unit: the digest of each document --> work/digests/000000.npy              by the process that claims the unit
    all units, one bucket of digests at a time --> work/repeated/000000.digests     by one process, once
    each unit again: documents whose digest the second file holds, and repeated ones within the unit, are left out

Of equal texts the first one stays, in the order of the units and of the documents within each. Documents that the
weight of their source leaves out have no digest, because a text that is not taken repeats nothing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.stage.unit_notes import UnitNotes
from capgap.pipeline.store.files import atomic_file, write_atomically

DIGESTED_FOLDER, DIGESTS_FOLDER, _REPEATED_FOLDER = "digested", "digests", "repeated"
_DONE_NAME = "repeated.done"
_DIGEST_BYTES = 16
# A bucket is sorted in memory. A document takes 16 bytes of digest, 8 bytes of unit, and as much again for the order.
_BUCKET_DOCUMENTS = 1 << 21

Digests = npt.NDArray[np.uint64]


def earlier_digests(work: Path, unit: int) -> set[bytes]:
    """Return the digests of those texts of one unit that occur in a unit before it, 16 bytes each."""
    path = work / _REPEATED_FOLDER / f"{unit:06d}.digests"
    data = path.read_bytes() if path.is_file() else b""
    return {data[start : start + _DIGEST_BYTES] for start in range(0, len(data), _DIGEST_BYTES)}


def forget_repeated(work: Path) -> None:
    """Remove all digests, because the sources hold other text now."""
    # first the mark that they are complete, in case a kill comes in between
    (work / _DONE_NAME).unlink(missing_ok=True)
    for name in (DIGESTED_FOLDER, DIGESTS_FOLDER, _REPEATED_FOLDER):
        shutil.rmtree(work / name, ignore_errors=True)


def write_digests(notes: UnitNotes, unit: int, digests: list[bytes]) -> None:
    """Write the digests of a unit's documents, 16 bytes each, in the order of the documents, and note the unit."""
    with atomic_file(notes.work / DIGESTS_FOLDER / f"{unit:06d}.npy") as file:
        np.save(file, np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64))
    write_atomically(notes.path(unit), "{}")


def is_found(work: Path) -> bool:
    """Return whether the repeated documents of all units have been found."""
    return (work / _DONE_NAME).is_file()


def find_repeated(work: Path, num_units: int, bucket_documents: int = _BUCKET_DOCUMENTS) -> None:
    """Find the texts that occur in several units, and write the digests of the repeated ones, unit by unit.

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
        digests_D2, units = _repeated_in(work, num_units, bucket, num_buckets)
        for unit in np.unique(units):
            with (folder / f"{int(unit):06d}.digests").open("ab") as file:
                file.write(digests_D2[units == unit].astype(">u8").tobytes())
    write_atomically(work / _DONE_NAME, "")


def _repeated_in(
    work: Path, num_units: int, bucket: int, num_buckets: int
) -> tuple[Digests, npt.NDArray[np.integer[Any]]]:
    """Return the digests of one bucket [D, 2] that occur in a unit before theirs, and the numbers of the units [D]."""
    parts, units = [], []
    for unit in range(num_units):
        digests_D2 = _digests(work, unit)
        parts.append(np.asarray(digests_D2[digests_D2[:, 0] % np.uint64(num_buckets) == bucket]))
        units.append(np.full(len(parts[-1]), unit, np.int64))
    digests_D2, unit_D = np.concatenate(parts), np.concatenate(units)
    order = np.lexsort((unit_D, digests_D2[:, 1], digests_D2[:, 0]))
    digests_D2, unit_D = digests_D2[order], unit_D[order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = (digests_D2[1:] != digests_D2[:-1]).any(axis=1)
    first_unit_D = unit_D[is_first][np.cumsum(is_first) - 1]
    is_again = unit_D > first_unit_D
    return digests_D2[is_again], unit_D[is_again]


def _digests(work: Path, unit: int) -> Digests:
    digests_D2: Digests = np.load(work / DIGESTS_FOLDER / f"{unit:06d}.npy", mmap_mode="r")
    return digests_D2
