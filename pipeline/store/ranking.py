"""Ids by how often a corpus uses them: members hold an id's rank instead, so that high bytes are mostly 0.

The ranking is a pure function of the corpus. It lies beside the shards as a file of its own, `ids-by-frequency.u32`,
whose digest the manifest names: without it, or with another one, no member can be read.

Legend: V vocabulary, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from capgap.schemas.errors import CorruptError
from capgap.schemas.records import IntArray, Sequences

RANKING_NAME = "ids-by-frequency.u32"

# So many tokens tell what is frequent; a larger corpus is not read twice for the rest.
_ENOUGH_TOKENS = 1 << 24


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
    """Ids by falling frequency in the first 16 million tokens, equals in their own order."""
    counts_V: npt.NDArray[np.int64] = np.zeros(vocab_size, np.int64)
    num_tokens = 0
    for block in blocks:
        counts_V += np.bincount(block.tokens_BL1.ravel(), minlength=vocab_size)
        num_tokens += block.tokens_BL1.size
        if num_tokens >= _ENOUGH_TOKENS:
            break
    return Ranking(np.argsort(-counts_V, kind="stable").astype(np.int32))


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
