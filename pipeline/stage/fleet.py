"""Replicas on Ray that make a stage's units of work, each replica in a process of its own.

    queue of units --> replica: start(), then make(i) --> result of unit i
         ^                |
         +- dies with i --+   another replica takes its place; at the third death with i the stage stops

A unit is made whole or not at all, so that it can safely be made again. Every few seconds each replica is asked how
far it is within its units.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.progress import advance_within, unheard
from capgap.pipeline.stage.ray_cluster import Cluster
from capgap.schemas.errors import CapgapError, InputError, MachineError

MAX_DEATHS = 3
_PATIENCE_S, _ASK_EVERY_S, _ANSWER_S = 60.0, 5.0, 1.0

# the disk is full, or the folder may not be written: another attempt would fail in the same way
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class CountedReplica:
    """A replica that reports how far it is within its units."""

    def how_far(self) -> float:
        """Return the sum of the shares of units that the replica has finished since it was started."""
        return unheard()


class Fleet:
    """A number of replicas that make units; each replica that dies is replaced by another.

    Args:
        cluster: Cluster on which the replicas run.
        kind: Class of a replica, with `start()` and `make(unit)`, each of which may be called again after a death.
            Progress within units is counted where it is a `CountedReplica`.
        arguments: Arguments of the class's constructor.
        num_replicas: Number of replicas that run at once.
        in_flight: Number of units that a replica makes at once, each in a thread of its own.
        setting: Name of the setting that asks for replicas, for errors; its section names the stage.
        unit: Name of one unit, for errors.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: type,
        arguments: tuple[Any, ...],
        num_replicas: int,
        in_flight: int,
        setting: str,
        unit: str = "shard",
    ) -> None:
        self._cluster, self._ray, self._num_replicas = cluster, cluster.ray, num_replicas
        self._kind, self._arguments, self._in_flight = kind, arguments, in_flight
        self._setting, self._unit, self._stage = setting, unit, setting.partition(".")[0]
        self._queue: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._deaths: Counter[int | None] = Counter()
        # every call that has not returned: its replica, and its unit, or None for the call of `start`
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        self._heard: Counter[Any] = Counter()

    def make(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        """Make these units, and yield each index with what `make` returned as soon as it is finished.

        Raises:
            MachineError: Replicas keep dying.
            CapgapError: Whatever a replica raises; a fault that the user can mend is raised at once.
        """
        self._queue.extend(indices)
        for _ in range(self._num_replicas):
            self._start()
        patient, begun = True, time.monotonic()
        while self._calls:
            ready, _ = self._ray.wait(list(self._calls), timeout=_ASK_EVERY_S)
            if not ready:
                for replica in {replica for replica, index in self._calls.values() if index is not None}:
                    self._ask(replica)
                if patient and time.monotonic() - begun >= _PATIENCE_S:
                    said = f"no replica has made a {self._unit} yet; they start, or wait for devices in use"
                    event("replicas_starting", f"{self._stage}: {said}")
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
                # asked before the whole unit is counted, so that its parts are not counted after it
                self._ask(replica)
                yield index, made
            else:
                self._deaths[None] = 0
            self._feed(replica)

    def _ask(self, replica: Any) -> None:
        """Count the replica's progress within units; what a replica does not answer now, it reports the next time."""
        if not issubclass(self._kind, CountedReplica):
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            told = self._ray.get(replica.how_far.remote(), timeout=_ANSWER_S)
            advance_within(told - self._heard[replica])
            self._heard[replica] = told

    def _start(self) -> None:
        # one thread more than there are units, so that the replica can answer meanwhile
        replica = self._cluster.actor(self._kind, self._in_flight + 1).remote(*self._arguments)
        self._calls[replica.start.remote()] = (replica, None)

    def _feed(self, replica: Any) -> None:
        flying = [index for _, index in self._calls_of(replica)]
        if any(index in self._deaths for index in flying):
            return
        if self._suspects and not flying:
            # a suspect unit is made alone, so that no other unit is blamed if the replica dies
            self._send(replica, self._suspects.popleft())
            return
        # a replica takes no second unit when few are left, because another replica may be idle
        while self._queue and (
            not flying or (len(flying) < self._in_flight and len(self._queue) >= self._num_replicas)
        ):
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
        """Kill a replica whose state cannot be trusted, queue its units for other replicas, and start another one."""
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
                    + ("before it had started" if one is None else f"while it made this {self._unit}"),
                    where=self._setting if one is None else f"{self._unit} {one}",
                    found=why,
                    fix=f"see what the replicas printed in {self._cluster.keep_logs()}",
                )
            if one is not None:
                self._suspects.append(one)
        event(
            "replica_died", f"{self._stage}: a replica died ({why}); another takes its place", logging.WARNING, why=why
        )
        self._start()


def require_seen(work: Path, folder: Path, what: str) -> None:
    """Raise InputError where a replica's machine does not see `work`, the work folder in the folder of `what`."""
    if not work.is_dir():
        raise InputError(
            f"this machine does not see the {what}'s folder",
            where=f"{os.uname().nodename}:{folder}",
            expected="a file system that all machines of the cluster share",
            fix="set out to a folder there",
        )


class _ReplicaDiedError(Exception):
    """A replica's process is gone, or its engine can no longer be trusted."""


def _cause_of_death(text: str) -> str:
    """Return the cause of a death from Ray's long message, in a few words."""
    for line in text.splitlines():
        _, mark, detail = line.partition("Worker exit detail: ")
        if mark:
            return detail.split(". ")[0]
    return text.splitlines()[0] if text else "no reason given"
