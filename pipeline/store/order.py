"""The order of samples as a pure function of seed and epoch: nothing but a position need ever be saved.

    members, permuted --> windows of W members --> the window's sequences, permuted --> one stream per epoch

A reader holds one window of members at a time, so memory is bounded whatever the size of the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt


class EpochOrder:
    """Where each position of an epoch's stream lies.

    Args:
        member_sizes: sequences in each member, in the order of the manifest.
        seed: of the whole training.
        epoch: counted from 0; each has its own order.
        window_members: members that are mixed with one another.
    """

    def __init__(self, member_sizes: Sequence[int], seed: int, epoch: int, window_members: int) -> None:
        self._seed, self._epoch, self._window = seed, epoch, window_members
        self._members = _generator(seed, epoch, "members").permutation(len(member_sizes))
        sizes = np.asarray(member_sizes, dtype=np.int64)[self._members]
        self._ends = np.cumsum(sizes)
        self._window_ends = self._ends[
            np.minimum(np.arange(window_members, len(sizes) + window_members, window_members), len(sizes)) - 1
        ]
        self._in_window = lru_cache(maxsize=2)(self._permute_window)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(member, sequence within it) for the positions from `start` to `stop`."""
        found: list[tuple[int, int]] = []
        while start < stop:
            window = int(np.searchsorted(self._window_ends, start, side="right"))
            first = int(self._window_ends[window - 1]) if window else 0
            end = min(stop, int(self._window_ends[window]))
            for position in self._in_window(window)[start - first : end - first]:
                member = int(np.searchsorted(self._ends, position, side="right"))
                before = int(self._ends[member - 1]) if member else 0
                found.append((int(self._members[member]), int(position) - before))
            start = end
        return found

    def _permute_window(self, window: int) -> npt.NDArray[np.int64]:
        first = int(self._window_ends[window - 1]) if window else 0
        generator = _generator(self._seed, self._epoch, f"window {window}")
        return first + generator.permutation(int(self._window_ends[window]) - first)


def _generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
