"""Chooses the sequences that are measured, evenly spread over a few shards, so that a large cache need not be read.

Legend: B sequences of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store import ShardReader
from capgap.schemas.records import Sequences, Targets

Place = tuple[int, int, npt.NDArray[np.int64]]
"""The number of a shard, the number of a member in it, and the chosen sequences of that member [B]."""


@dataclass(frozen=True)
class Sampling:
    """How much of a cache is read.

    Attributes:
        num_sequences: Number of sequences to measure; all sequences if the cache has no more.
        num_shards: Number of shards to open, evenly spread; all shards if all sequences are measured.
    """

    num_sequences: int = 256
    num_shards: int = 8


def places_of(reader: ShardReader, sampling: Sampling) -> list[Place]:
    """Choose the sequences to read, which depend only on the shard set and the sampling."""
    shards = reader.shard_set.shards
    total = reader.shard_set.num_sequences
    if sampling.num_sequences >= total:
        opened = list(range(len(shards)))
    else:
        opened = _evenly(len(shards), min(sampling.num_shards, len(shards)))
    sizes = [(shard, member.num_sequences) for shard in opened for member in shards[shard].each_member()]
    wanted = np.array(_evenly(sum(size for _, size in sizes), sampling.num_sequences), np.int64)
    found: list[Place] = []
    first, number, last_shard = 0, -1, -1
    for shard, size in sizes:
        number = number + 1 if shard == last_shard else 0
        last_shard = shard
        rows_B = wanted[(wanted >= first) & (wanted < first + size)] - first
        if len(rows_B):
            found.append((shard, number, rows_B))
        first += size
    return found


def read_places(reader: ShardReader, places: list[Place]) -> Iterator[tuple[Sequences, Targets, npt.NDArray[np.int64]]]:
    """Yield the sequences and targets of each chosen member, and the numbers of its chosen sequences.

    Raises:
        CorruptError, InputError: A shard is damaged or cannot be read.
    """
    for shard, member, rows_B in places:
        sequences, targets = reader.read_member(shard, member)
        assert targets is not None
        yield sequences, targets, rows_B


def _evenly(count: int, wanted: int) -> list[int]:
    """Return `wanted` of the numbers 0 to count - 1, evenly spaced, or all of them if there are no more."""
    if wanted >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]
