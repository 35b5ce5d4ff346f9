"""Several engines at once, each a Ray actor with its own devices, on this machine or on a cluster.

Each actor takes the lease on its devices, starts its teacher, and gets shards from a `Fleet`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from capgap.pipeline.cache.cross_check import CheckedShardScorer
from capgap.pipeline.cache.held import SHARDS_PER_REPLICA
from capgap.pipeline.cache.shards import CacheJob, FinishedShard, ShardScorer
from capgap.pipeline.cache.vllm_start import leave_cores_unbound
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.stage.device import devices_from
from capgap.pipeline.stage.fleet import CountedReplica, Fleet, require_seen
from capgap.pipeline.stage.lease import LeaseRequest
from capgap.pipeline.stage.ray_cluster import ray_cluster

_SETTING = "cache.replicas"


def make_by_replicas(job: CacheJob, indices: list[int], context: StageContext) -> Iterator[tuple[int, FinishedShard]]:
    """Make the given shards by replicas, and yield each index and shard as it is finished.

    Args:
        job: the cache's job; its settings say how many replicas there are.
        indices: indices of the shards to be made; no more replicas than shards are started.
        context: the stage's context, which says how a replica takes the lease on a device.

    Raises:
        MachineError: Ray is not installed, there are too few devices, or replicas keep dying.
        CapgapError: as `ShardScorer`; an error that the user can fix is raised at once.
    """
    num_replicas = min(job.settings.replicas, len(indices))
    claim = LeaseRequest(context.holder, context.wait, context.group)
    num_gpus = 0 if job.device == "cpu" else job.settings.num_devices
    with ray_cluster(num_replicas, num_gpus, _SETTING) as cluster:
        fleet = Fleet(
            cluster, Replica, (cluster.ray.put(_portable(job)), claim), num_replicas, SHARDS_PER_REPLICA, _SETTING
        )
        yield from fleet.make(indices)


class Replica(CountedReplica):
    """An engine in its own process.

    Two threads may call it at a time: one shard is written while the next one is scored.
    """

    def __init__(self, job: CacheJob, claim: LeaseRequest) -> None:
        leave_cores_unbound()
        self._job, self._claim = job, claim
        self._teacher = ThreadPoolExecutor(1, thread_name_prefix="capgap-teacher")
        self._held = ExitStack()
        self._scorer: ShardScorer | None = None

    def start(self) -> None:
        """Take the lease on the replica's own devices and start the teacher there.

        Raises:
            InputError: this machine does not see the cache's folder.
            CapgapError: as the lease and the engine.
        """
        job = self._job
        require_seen(job.work, job.folder, "cache")
        devices = devices_from(job.device, job.settings.num_devices)
        self._held.enter_context(self._claim.leases(devices))
        self._scorer = CheckedShardScorer(job)
        self._teacher.submit(self._scorer.start).result()

    def make(self, index: int) -> FinishedShard:
        """Score and write shard `index`, unless it is finished already."""
        assert self._scorer is not None
        found = self._scorer.finished(index)
        if found is not None:
            return found
        return self._scorer.write(self._teacher.submit(self._scorer.score, index).result())


def _portable(job: CacheJob) -> CacheJob:
    """Return the same job with absolute paths, as a replica has another working folder."""
    teacher = Path(job.teacher)
    return dataclasses.replace(
        job,
        corpus=job.corpus.resolve(),
        folder=job.folder.resolve(),
        work=job.work.resolve(),
        teacher=str(teacher.resolve()) if teacher.is_dir() else job.teacher,
    )
