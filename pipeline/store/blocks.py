"""A memory-bounded cache of blocks, decoded or as stored; a block that several threads ask for is read only once."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

import numpy as np

from capgap.pipeline.store.stored import StoredBlock
from capgap.schemas.records import Sequences, Targets

Key = TypeVar("Key", bound=Hashable)
LoadedBlock = tuple[Sequences, Targets | None] | StoredBlock


class BlockCache(Generic[Key]):
    """Keeps the most recently used blocks, up to a number of bytes; the newest block is kept whatever its size.

    Args:
        read: Reads the block of a key. Its error is raised in every thread that waits for the block, and the next
            request reads again.
        max_bytes: Largest size of all blocks held, in bytes.
        once: Drop a block after as many requests as it has sequences, because in one epoch no request follows.
    """

    def __init__(self, read: Callable[[Key], LoadedBlock], max_bytes: int, once: bool = False) -> None:
        self._read, self._max_bytes, self._once = read, max_bytes, once
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Key, Future[LoadedBlock]] = OrderedDict()
        self._sizes: dict[Key, int] = {}
        self._uses: Counter[Key] = Counter()
        self.num_bytes = 0

    def get(self, key: Key) -> LoadedBlock:
        """Return the block of a key, and read it first if it is not in memory."""
        with self._lock:
            known = key in self._blocks
            future = self._blocks.setdefault(key, Future())
            self._blocks.move_to_end(key)
        block = future.result() if known else self._make(key, future)
        if self._once:
            self._count(key, len(block if isinstance(block, StoredBlock) else block[0]))
        return block

    def _count(self, key: Key, most: int) -> None:
        with self._lock:
            self._uses[key] += 1
            if self._uses[key] >= most:
                del self._uses[key]
                if key in self._sizes:  # otherwise it has been dropped already, or is being read again
                    self._drop(key)

    def _make(self, key: Key, future: Future[LoadedBlock]) -> LoadedBlock:
        try:
            block = self._read(key)
            num_bytes = _size_of(block)
        except BaseException as error:
            with self._lock:
                del self._blocks[key]
            future.set_exception(error)
            raise
        with self._lock:
            self._sizes[key] = num_bytes
            self.num_bytes += num_bytes
            self._blocks.move_to_end(key)
            self._drop_oldest()
        future.set_result(block)
        return block

    def _drop_oldest(self) -> None:
        # blocks that are still being read have no size yet and stay
        for key in list(self._sizes_in_order())[:-1]:
            if self.num_bytes <= self._max_bytes:
                return
            self._drop(key)

    def _drop(self, key: Key) -> None:
        del self._blocks[key]
        self.num_bytes -= self._sizes.pop(key)

    def _sizes_in_order(self) -> list[Key]:
        return [key for key in self._blocks if key in self._sizes]


def _size_of(block: LoadedBlock) -> int:
    if isinstance(block, StoredBlock):
        return block.num_bytes
    return sum(_num_bytes(part) for part in block)


def _num_bytes(part: object) -> int:
    """Return the bytes of an array, or of all arrays of a record."""
    if part is None or isinstance(part, np.ndarray):
        return 0 if part is None else int(part.nbytes)
    return sum(map(_num_bytes, vars(part).values()))
