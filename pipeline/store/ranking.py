"""The ranking of ids by frequency: members store the rank of an id instead of the id, so that high bytes are mostly 0.

The ranking is a pure function of the corpus, which counts its ids when it is made: `id-counts.npz` next to the corpus's
shards holds an array [V], int64, for each split. The ranking is the file `ids-by-frequency.u32` next to the shards. The
manifest holds its digest, because members cannot be read without the right ranking.

Legend: V vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.files import atomic_file
from capgap.schemas.errors import CorruptError
from capgap.schemas.manifest import FileEntry
from capgap.schemas.records import IntArray, Sequences

RANKING_NAME = "ids-by-frequency.u32"
COUNTS_NAME = "id-counts.npz"


@dataclass(frozen=True, eq=False)
class Ranking:
    """A permutation of the ids.

    Attributes:
        ids_V: The id of each rank [V], int32.
    """

    ids_V: IntArray

    @cached_property
    def ranks_V(self) -> IntArray:  # noqa: N802  # used like a field
        """Return the rank of each id [V], int32."""
        ranks_V = np.empty_like(self.ids_V)
        ranks_V[self.ids_V] = np.arange(len(self.ids_V), dtype=np.int32)
        return ranks_V

    @cached_property
    def data(self) -> bytes:
        """Return the content of the ranking's file: the id of each rank as little-endian uint32."""
        return self.ids_V.astype("<u4").tobytes()

    @cached_property
    def sha256(self) -> str:
        """Return the SHA-256 digest of the ranking's file, hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranking) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def rank_ids(blocks: Iterable[Sequences], vocab_size: int) -> Ranking:
    """Rank ids by falling frequency in these blocks; equally frequent ids by rising id."""
    return rank_counts(count_ids(blocks, vocab_size))


def rank_counts(counts_V: npt.NDArray[np.int64]) -> Ranking:
    """Rank ids by falling count; ids of equal count by rising id."""
    return Ranking(np.argsort(-counts_V, kind="stable").astype(np.int32))


def count_ids(blocks: Iterable[Sequences], vocab_size: int) -> npt.NDArray[np.int64]:
    """Count how often each id occurs in these blocks [V], int64."""
    counts_V: npt.NDArray[np.int64] = np.zeros(vocab_size, np.int64)
    for block in blocks:
        counts_V += np.bincount(block.tokens_BL1.ravel(), minlength=vocab_size)
    return counts_V


def write_counts(folder: Path, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
    """Write the counts of ids of each split of a corpus; the same counts give the same bytes."""
    with atomic_file(folder / COUNTS_NAME) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, counts_V in counts.items():
            data = io.BytesIO()
            np.save(data, counts_V)
            # ZipInfo has a fixed date by default, so the bytes do not depend on the time of writing
            archive.writestr(zipfile.ZipInfo(f"{split}.npy"), data.getvalue(), zipfile.ZIP_DEFLATED)


def read_counts(folder: Path, files: Iterable[FileEntry], split: str, vocab_size: int) -> npt.NDArray[np.int64]:
    """Read how often each id occurs in a split of a corpus [V], int64.

    Args:
        folder: Folder of the corpus.
        files: Files that the corpus's manifest lists.
        split: Name of the split, as given to `write_counts`.
        vocab_size: V.

    Raises:
        CorruptError: The file is missing, is not the one that the manifest lists, or holds no counts of this split.
    """
    path = folder / COUNTS_NAME
    listed = next((file.sha256 for file in files if file.path == COUNTS_NAME), None)
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != listed:
            raise ValueError("another file than the manifest lists")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            counts_V: npt.NDArray[np.int64] = stored[split]
        if counts_V.shape != (vocab_size,):
            raise ValueError(f"counts of {counts_V.shape} ids")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptError(
            "the counts of ids are not what they were",
            where=path,
            found=str(error),
            expected=f"a count of each of {vocab_size} ids",
            fix="make the corpus again",
        ) from None
    return counts_V


def read_ranking(data: bytes, sha256: str, vocab_size: int, where: str) -> Ranking:
    """Return the ranking in the bytes of its file.

    Raises:
        CorruptError: The digest is not the manifest's, or the ids are no permutation of the vocabulary.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise CorruptError(
            "the ranking of ids is not what it was", where=where, found=f"sha256 {digest[:12]}", expected=sha256[:12]
        )
    ids_V = np.frombuffer(data, "<u4") if len(data) % 4 == 0 else np.zeros(0, np.uint32)
    if not np.array_equal(np.sort(ids_V), np.arange(vocab_size)):
        raise CorruptError("not a ranking of ids", where=where, expected=f"each id from 0 to {vocab_size - 1} once")
    return Ranking(ids_V.astype(np.int32))
