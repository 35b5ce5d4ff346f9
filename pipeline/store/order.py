"""The order of sequences is a pure function of seed and epoch, so that only a position ever needs to be saved.

    shards, permuted; members, permuted within each --> one layout of all sequences, cut into C lanes of equal length
    lane --> windows of Q sequences, permuted
    sequence i of the epoch = place i // C of lane i mod C

Neighbors in the stream lie in different lanes, so they come from distant parts of the data whatever the window. The
lanes depend on the data and never on the hardware. Rank r of w reads the sequences i with i mod w = r: those of C / w
lanes of its own if w divides C, and of all lanes otherwise. The stream as a whole is the same for every w. A reader
holds one window a lane at a time, so memory is bounded whatever the size of the cache. The sizes of a shard's members
are asked for only when the shard is reached.
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
# Members that are open at once over all lanes. 128 members of 8k tokens mix a million tokens. Decoded, they take about
# 150 MB at 15 ids a token, and 550 MB at 64 ids a token.
_OPEN_MEMBERS = 128


class Place(NamedTuple):
    """The place of a sequence: the numbers of its shard, of the member in the shard, and of its row in the member."""

    shard: int
    member: int
    row: int


class Order:
    """Computes the place of each sequence of each epoch's stream.

    Args:
        shard_sizes: Number of sequences in each shard.
        member_sizes: Returns the number of sequences in each member of a shard, given the shard's number; it is called
            only for shards that are reached.
        num_members: Number of members in all shards.
        seed: Seed of the whole training.
        lanes: Number of lanes; None for 64, or fewer if there are less than 128 members.

    Attributes:
        lanes: Number of lanes.
        window: Number of sequences in a window of a lane.
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
        # the caches hold two epochs, and for every lane its current shard and window and the next ones
        self._epoch = lru_cache(maxsize=2)(self._permute_shards)
        self._shard = lru_cache(maxsize=2 * self.lanes + 8)(self._permute_members)
        self._window = lru_cache(maxsize=2 * self.lanes + 8)(self._permute_window)

    def __len__(self) -> int:
        """Return the number of sequences in an epoch."""
        return self._num_sequences

    def locate(self, epoch: int, index: int) -> Place:
        """Return the place of sequence `index` of the epoch's stream."""
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
        """Yield the place of sequence `index` of the epoch's stream, then the places that may replace a damaged one.

        First come the other sequences of its window. Then come the other lanes' windows of the same number, which are
        read at that time anyway, and then all other windows. The order of the lanes is drawn for this sequence, so that
        the sequences of a lost shard, which can be whole lanes, are not all replaced by the same few sequences.
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
        """Return the number of sequences in a lane; lanes differ by at most one sequence."""
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
        """Yield the places of a window, starting at number `first` and wrapping around at its end."""
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
    """Return the number of lanes for so many members: 1, or at most half as many, so that a lane has members to mix."""
    lanes = 1
    while lanes < _MOST_LANES and 4 * lanes <= num_members:
        lanes *= 2
    return lanes


def _generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
