"""Several engines at once, each an actor of Ray with devices of its own: on this machine, or on a cluster.

    queue of shards --> replica: lease, teacher; make(i) --> FinishedShard
         ^                 |
         +-- dies with i --+   another replica takes its place; at the third death with i the stage stops

A shard is made whole or not at all, so whoever makes it again does no harm.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from capgap.pipeline.cache.cross_check import CheckedShardScorer
from capgap.pipeline.cache.ray_cluster import Cluster, ray_cluster
from capgap.pipeline.cache.shards import CacheJob, FinishedShard, ShardScorer
from capgap.pipeline.stage.context import StageContext
from capgap.pipeline.stage.device import devices_from
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.lease import leases
from capgap.schemas.errors import CapgapError, InputError, MachineError

MAX_DEATHS = 3
_PATIENCE_S = 60.0

# one that the teacher is at, and one that is encoded and written meanwhile
_IN_FLIGHT = 2

# a full disk, or a folder that may not be written: trying again mends nothing
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def make_by_replicas(job: CacheJob, indices: list[int], context: StageContext) -> Iterator[tuple[int, FinishedShard]]:
    """Make these shards, and yield each with its index as it is finished.

    Args:
        job: of the cache.
        indices: of shards that are not finished; no more replicas than these are started.
        context: of the stage: says how many replicas there are, and how they take the lease on a device.

    Raises:
        MachineError: Ray is not installed, there are too few devices, or replicas keep dying.
        CapgapError: as `ShardScorer`; whatever the user can mend is raised at once.
    """
    num_replicas = min(job.settings.replicas, len(indices))
    claim = Claim(context.holder, context.wait, context.group)
    with ray_cluster(num_replicas, 0 if job.device == "cpu" else job.settings.num_devices) as cluster:
        yield from _Fleet(cluster, _portable(job), num_replicas, claim).make(indices)


@dataclasses.dataclass(frozen=True)
class Claim:
    """How a replica asks for the lease on its devices; the attributes are arguments of `leases`."""

    holder: str
    wait: bool
    group: str


class Replica:
    """An engine in a process of its own.

    Calls come from two threads at a time: a shard is written beside the scoring of the next.
    """

    def __init__(self, job: CacheJob, claim: Claim) -> None:
        # vLLM binds the threads of each engine to the same cores, unless it is told not to
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
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
        if not job.work.is_dir():
            raise InputError(
                "this machine does not see the cache's folder",
                where=f"{os.uname().nodename}:{job.folder}",
                expected="a file system that all machines of the cluster share",
                fix="set out to a folder there",
            )
        devices = devices_from(job.device, job.settings.num_devices)
        self._held.enter_context(leases(devices, **dataclasses.asdict(self._claim)))
        self._scorer = CheckedShardScorer(job)
        self._teacher.submit(self._scorer.start).result()

    def make(self, index: int) -> FinishedShard:
        """As `ShardScorer.make`."""
        assert self._scorer is not None
        found = self._scorer.finished(index)
        if found is not None:
            return found
        return self._scorer.write(self._teacher.submit(self._scorer.score, index).result())


class _Fleet:
    """Hands shards to replicas, and starts another replica for each that dies."""

    def __init__(self, cluster: Cluster, job: CacheJob, num_replicas: int, claim: Claim) -> None:
        self._cluster, self._ray, self._num_replicas = cluster, cluster.ray, num_replicas
        self._arguments = (cluster.ray.put(job), claim)
        self._queue: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int | None] = Counter()
        # every call under way: its replica, and the shard or None for the start
        self._calls: dict[Any, tuple[Any, int | None]] = {}

    def make(self, indices: list[int]) -> Iterator[tuple[int, FinishedShard]]:
        """As `make_by_replicas`."""
        self._queue.extend(indices)
        for _ in range(self._num_replicas):
            self._start()
        patient = True
        while self._calls:
            ready, _ = self._ray.wait(list(self._calls), timeout=_PATIENCE_S if patient else None)
            if not ready:
                event(
                    "replicas_starting",
                    "cache: no replica has made a shard yet; they start, or wait for devices in use",
                )
                patient = False
                continue
            replica, index = self._calls.pop(ready[0])
            try:
                made = self._result(ready[0])
            except _ReplicaDiedError as died:
                self._bury(replica, index, str(died))
                continue
            if index is not None:
                patient = False
                yield index, made
            else:
                self._deaths[None] = 0
            self._feed(replica)

    def _start(self) -> None:
        replica = self._cluster.actor(Replica, _IN_FLIGHT).remote(*self._arguments)
        self._calls[replica.start.remote()] = (replica, None)

    def _feed(self, replica: Any) -> None:
        flying = [index for _, index in self._calls_of(replica)]
        if any(index in self._deaths for index in flying):
            return
        if self._suspects and not flying:
            # alone, so that nothing else is blamed for its deaths
            self._send(replica, self._suspects.popleft())
            return
        # the last shards are not hoarded: another replica may be idle
        while self._queue and (not flying or (len(flying) < _IN_FLIGHT and len(self._queue) >= self._num_replicas)):
            flying.append(self._queue[0])
            self._send(replica, self._queue.popleft())

    def _send(self, replica: Any, index: int) -> None:
        self._calls[replica.make.remote(index)] = (replica, index)

    def _calls_of(self, replica: Any) -> list[tuple[Any, int | None]]:
        return [(call, index) for call, (owner, index) in self._calls.items() if owner == replica]

    def _result(self, call: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, CapgapError) or (isinstance(cause, OSError) and cause.errno in _LASTING):
                raise cause from None
            raise _ReplicaDiedError(f"{type(cause).__name__}: {cause}") from None
        except errors.RayActorError as error:
            raise _ReplicaDiedError(_cause_of_death(str(error))) from None

    def _bury(self, replica: Any, index: int | None, why: str) -> None:
        """Whatever state its engine is in, nobody uses it again; its shards go to others."""
        self._ray.kill(replica)
        lost = [index]
        for call, other in self._calls_of(replica):
            del self._calls[call]
            lost.append(other)
        for one in lost:
            self._deaths[one] += 1
            if self._deaths[one] >= MAX_DEATHS:
                raise MachineError(
                    f"a replica died {MAX_DEATHS} times "
                    + ("before its teacher had started" if one is None else "while it made this shard"),
                    where="cache.replicas" if one is None else f"shard {one}",
                    found=why,
                    fix=f"see the replicas' own words in {self._cluster.keep_logs()}",
                )
            if one is not None:
                self._suspects.append(one)
        event("replica_died", f"cache: a replica died ({why}); another takes its place", logging.WARNING, why=why)
        self._start()


class _ReplicaDiedError(Exception):
    """A replica's process is gone, or its engine cannot be trusted any more."""


def _cause_of_death(text: str) -> str:
    """Ray's essay in a few words."""
    for line in text.splitlines():
        _, mark, detail = line.partition("Worker exit detail: ")
        if mark:
            return detail.split(". ")[0]
    return text.splitlines()[0] if text else "no reason given"


def _portable(job: CacheJob) -> CacheJob:
    """The same job in absolute paths: a replica's working folder is another."""
    teacher = Path(job.teacher)
    return dataclasses.replace(
        job,
        corpus=job.corpus.resolve(),
        folder=job.folder.resolve(),
        work=job.work.resolve(),
        teacher=str(teacher.resolve()) if teacher.is_dir() else job.teacher,
    )
