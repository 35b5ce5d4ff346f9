"""Ids by how often a corpus uses them: members hold an id's rank instead, so that high bytes are mostly 0.

The ranking is a pure function of the corpus, which counts its ids when it is made: `id-counts.npz` beside its shards
holds an array [V], int64, for each split. It lies beside the shards as a file of its own, `ids-by-frequency.u32`,
whose digest the manifest names: without it, or with another one, no member can be read.

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
        ids_V: the id of each rank [V], int32.
    """

    ids_V: IntArray

    @cached_property
    def ranks_V(self) -> IntArray:  # noqa: N802  # a field in all but name
        """The rank of each id."""
        ranks_V = np.empty_like(self.ids_V)
        ranks_V[self.ids_V] = np.arange(len(self.ids_V), dtype=np.int32)
        return ranks_V

    @cached_property
    def data(self) -> bytes:
        """The file: the id of each rank, 32 bits each, little-endian."""
        return self.ids_V.astype("<u4").tobytes()

    @cached_property
    def sha256(self) -> str:
        """Digest of the file."""
        return hashlib.sha256(self.data).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranking) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)


def rank_ids(blocks: Iterable[Sequences], vocab_size: int) -> Ranking:
    """Ids by falling frequency, equals in their own order."""
    return rank_counts(count_ids(blocks, vocab_size))


def rank_counts(counts_V: npt.NDArray[np.int64]) -> Ranking:
    """Ids by falling count, equals in their own order."""
    return Ranking(np.argsort(-counts_V, kind="stable").astype(np.int32))


def count_ids(blocks: Iterable[Sequences], vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each id stands there [V]."""
    counts_V: npt.NDArray[np.int64] = np.zeros(vocab_size, np.int64)
    for block in blocks:
        counts_V += np.bincount(block.tokens_BL1.ravel(), minlength=vocab_size)
    return counts_V


def write_counts(folder: Path, counts: Mapping[str, npt.NDArray[np.int64]]) -> None:
    """Write how often each split of a corpus holds each id; the same counts give the same bytes."""
    with atomic_file(folder / COUNTS_NAME) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, counts_V in counts.items():
            data = io.BytesIO()
            np.save(data, counts_V)
            # a date of its own, which is the same whenever it is written
            archive.writestr(zipfile.ZipInfo(f"{split}.npy"), data.getvalue(), zipfile.ZIP_DEFLATED)


def read_counts(folder: Path, files: Iterable[FileEntry], split: str, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often a split of a corpus holds each id [V].

    Args:
        folder: of the corpus.
        files: that its manifest lists.
        split: see `write_counts`.
        vocab_size: V.

    Raises:
        CorruptError: the file is not the one that the manifest lists, or is no such file.
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
    """The ranking that the manifest names.

    Raises:
        CorruptError: it is another file, or no permutation of the vocabulary.
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
