"""The order of sequences as a pure function of seed and epoch: nothing but a position need ever be saved.

    shards, permuted; members, permuted within each --> one layout of all sequences, cut into C lanes of equal length
    lane --> windows of Q sequences, permuted
    sequence i of the epoch = place i // C of lane i mod C

Neighbours in the stream lie in different lanes, so they come from far apart whatever the window. Lanes are a property
of the data, never of the hardware: rank r of w reads the sequences i with i mod w = r, which are those of its own C / w
lanes where w divides C and of all lanes where it does not; the stream as a whole is the same for every w. A reader
holds one window a lane at a time, so memory is bounded whatever the size of the cache; what it must know of a shard's
members is asked when the shard is met.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from capgap.schemas.errors import InputError

IntArray = npt.NDArray[np.int64]

# 64 lanes divide among 1, 2, 4 ... 64 ranks.
_MOST_LANES = 64
# Held open at once over all lanes: 128 members of 8k tokens mix a million tokens, and take about 150 MB when they are
# decoded at 15 ids a token, 550 MB at 64.
_OPEN_MEMBERS = 128


class Place(NamedTuple):
    """Where a sequence lies: number of the shard, of the member in it, of the sequence in that."""

    shard: int
    member: int
    row: int


class Order:
    """Where each sequence of each epoch's stream lies.

    Args:
        shard_sizes: sequences in each shard.
        member_sizes: sequences in each member of a shard, by its number; asked only for shards that are met.
        num_members: in all shards.
        seed: of the whole training.
        lanes: how many; left out, 64, or fewer for less than 128 members.

    Attributes:
        lanes: how many there are.
        window: sequences in a window of a lane.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        member_sizes: Callable[[int], Sequence[int]],
        num_members: int,
        seed: int,
        lanes: int | None = None,
    ) -> None:
        self._shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._member_sizes, self._seed = member_sizes, seed
        self._num_sequences = int(self._shard_sizes.sum())
        self.lanes = lanes if lanes is not None else lanes_for(num_members)
        if self.lanes < 1:
            raise InputError("lanes", found=self.lanes, expected="at least 1")
        per_member = -(-self._num_sequences // max(num_members, 1))
        self.window = max(1, per_member * max(1, _OPEN_MEMBERS // self.lanes))
        # bounded: two epochs, and for every lane the shard and the window it is in and the next ones
        self._epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._shard = lru_cache(maxsize=2 * self.lanes + 8)(self._permute_members)
        self._window = lru_cache(maxsize=2 * self.lanes + 8)(self._permute_window)

    def __len__(self) -> int:
        """Sequences of an epoch."""
        return self._num_sequences

    def locate(self, epoch: int, index: int) -> Place:
        """Where sequence `index` of the epoch's stream lies."""
        lane, place = index % self.lanes, index // self.lanes
        window, within = divmod(place, self.window)
        whole, over = divmod(self._num_sequences, self.lanes)
        start = lane * whole + min(lane, over)
        position = start + window * self.window + int(self._window(epoch, lane, window)[within])
        shards, ends = self._epoch(epoch)
        nth = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[nth])
        members, member_ends = self._shard(epoch, shard)
        position -= int(ends[nth]) - int(self._shard_sizes[shard])
        nth = int(np.searchsorted(member_ends, position, side="right"))
        before = int(member_ends[nth - 1]) if nth else 0
        return Place(shard, int(members[nth]), position - before)

    def candidates(self, epoch: int, index: int) -> Iterator[Place]:
        """Where sequence `index` of the epoch's stream lies, then all others, which may stand for a damaged one.

        The others of its window come first, and then windows of the other lanes in an order drawn for this sequence: of
        the same number, which are being read at that time anyway, and only then others. A shard that is lost is a run
        of whole lanes, and so no few sequences stand for all of it.
        """
        lane, place = index % self.lanes, index // self.lanes
        window, within = divmod(place, self.window)
        yield from self._of_window(epoch, lane, window, within)
        draw = _generator(self._seed, epoch, f"in place of {index}")
        others, first = draw.permutation(self.lanes), int(draw.integers(self.window))
        num_windows = -(-self.lane_length(0) // self.window)
        for further in range(num_windows):
            for other in map(int, others):
                if (further, other) != (0, lane):
                    yield from self._of_window(epoch, other, (window + further) % num_windows, first)

    def lane_length(self, lane: int) -> int:
        """Sequences in a lane: all lanes have as many, but for one."""
        whole, over = divmod(self._num_sequences, self.lanes)
        return whole + (lane < over)

    def _permute_shards(self, epoch: int) -> tuple[IntArray, IntArray]:
        shards = _generator(self._seed, epoch, "shards").permutation(len(self._shard_sizes))
        return shards, np.cumsum(self._shard_sizes[shards])

    def _permute_members(self, epoch: int, shard: int) -> tuple[IntArray, IntArray]:
        sizes = np.asarray(self._member_sizes(shard), dtype=np.int64)
        members = _generator(self._seed, epoch, f"members of shard {shard}").permutation(len(sizes))
        return members, np.cumsum(sizes[members])

    def _of_window(self, epoch: int, lane: int, window: int, first: int) -> Iterator[Place]:
        """The places of a window, from the one of that number on and around."""
        size = self._window_size(lane, window)
        for further in range(size):
            place = window * self.window + (first + further) % size
            yield self.locate(epoch, place * self.lanes + lane)

    def _window_size(self, lane: int, window: int) -> int:
        return max(0, min(self.window, self.lane_length(lane) - window * self.window))

    def _permute_window(self, epoch: int, lane: int, window: int) -> IntArray:
        return _generator(self._seed, epoch, f"lane {lane} window {window}").permutation(
            self._window_size(lane, window)
        )


def lanes_for(num_members: int) -> int:
    """Lanes of a set of that many members: at least two members each, so that a lane has something to mix."""
    lanes = 1
    while lanes < _MOST_LANES and 4 * lanes <= num_members:
        lanes *= 2
    return lanes


def _generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
