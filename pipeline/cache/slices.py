"""The shards of one slice, each under a lock of its own, so that two processes never make the same one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from capgap.pipeline.cache.cross_check import CheckedShardScorer
from capgap.pipeline.cache.held import WRITING_THREADS, require_room
from capgap.pipeline.cache.overlap import overlap
from capgap.pipeline.cache.shard_lines import shard_lines
from capgap.pipeline.cache.shards import SCORED_FOLDER, CacheJob, ScoredShard
from capgap.pipeline.cache.stage import prepare as prepare
from capgap.pipeline.stage.context import Slice
from capgap.pipeline.store.locks import ProcessLock
from capgap.schemas.manifest import MANIFEST_NAME

_CLAIMS_FOLDER = "claims"


def make_slice(job: CacheJob, part: Slice) -> None:
    """Make the shards of the slice that are not there and that nobody else is at.

    What a killed process had claimed is free again; it is made here, if this slice may make it.

    Raises:
        CapgapError: as `ShardScorer`.
    """
    # vLLM binds the threads of each engine to the same cores, unless it is told not to
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    claims, scorer = _Claims(job, part), CheckedShardScorer(job)
    wanted = [index for index in range(len(job.source.shards)) if part.has(index)]
    seq_len = job.source.seq_len
    require_room(job.settings, max(shard.num_sequences for shard in job.source.shards) * seq_len, seq_len)

    def write(shard: ScoredShard) -> None:
        written = scorer.write(shard)
        claims.release(shard.index)
        lines.finished(shard.index, written)

    try:
        with shard_lines(job, f"cache: slice {part}", wanted, claims.made(), job.device) as lines:
            for _ in overlap(claims.take_each(), scorer.score, write, WRITING_THREADS):
                pass
    finally:
        scorer.close()
        claims.close()


def all_made(job: CacheJob) -> bool:
    """Whether every shard of the cache says that it is finished; whoever writes the manifest verifies them all."""
    return len(_made(job)) == len(job.source.shards)


class _Claims:
    """The locks on shards that this process is at."""

    def __init__(self, job: CacheJob, part: Slice) -> None:
        self._job, self._part = job, part
        self._held: dict[int, ProcessLock] = {}
        self._folder = job.work / _CLAIMS_FOLDER
        self._folder.mkdir(parents=True, exist_ok=True)

    def take_each(self) -> Iterator[int]:
        """Each shard of the slice, once it is claimed, until all are made or claimed by others."""
        taken = True
        while taken:
            taken, made = False, self.made()
            for index in filter(self._part.has, range(len(self._job.source.shards))):
                if index not in made and self._take(index):
                    taken = True
                    yield index
                    made = self.made()

    def made(self) -> set[int]:
        """Indices of the shards that say they are finished."""
        return _made(self._job)

    def release(self, index: int) -> None:
        self._held.pop(index).close()

    def close(self) -> None:
        for index in list(self._held):
            self.release(index)

    def _take(self, index: int) -> bool:
        if index in self._held:
            return False
        try:
            lock = ProcessLock(self._folder / f"{index:06d}.lock")
        except FileNotFoundError:
            # the work folder is gone: the manifest was written
            return False
        if not lock.exclusive() or index in self.made() or self._finished():
            lock.close()
            return False
        self._held[index] = lock
        return True

    def _finished(self) -> bool:
        """Whoever writes the manifest removes the work folder after it, and with it all notes of finished shards."""
        return (self._job.folder / MANIFEST_NAME).is_file()


def _made(job: CacheJob) -> set[int]:
    """A listing, not a look at each file: network file systems answer it afresh."""
    try:
        return {int(path.stem) for path in Path(job.work / SCORED_FOLDER).glob("*.json")}
    except FileNotFoundError:
        return set()
