"""Replicas on Ray that make the units of a stage, each in a process of its own.

    queue of units --> replica: start(), then make(i) --> what it made
         ^                |
         +- dies with i --+   another replica takes its place; at the third death with i the stage stops

A unit is made whole or not at all, so whoever makes it again does no harm. Now and then each replica is asked how far
it is within its units.
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

# a full disk, or a folder that may not be written: trying again mends nothing
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class CountedReplica:
    """A replica that says how far it is."""

    def how_far(self) -> float:
        """The shares of units that it has told of since it was started."""
        return unheard()


class Fleet:
    """Hands units to replicas, and starts another replica for each that dies.

    Args:
        cluster: where they run.
        kind: of a replica: a class with `start()` and `make(unit)`, each of which may be called again after a death;
            of a `CountedReplica` progress is counted within units.
        arguments: of its constructor.
        num_replicas: how many at a time.
        in_flight: units that one has at a time, each in a thread of its own.
        setting: that asks for replicas; its section names the stage.
        unit: what is made, for errors.
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
        # every call under way: its replica, and the unit or None for the start
        self._calls: dict[Any, tuple[Any, int | None]] = {}
        self._heard: Counter[Any] = Counter()

    def make(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        """Make these units, and yield each with what `make` returned, as it is finished.

        Raises:
            MachineError: replicas keep dying.
            CapgapError: as the replica's; whatever the user can mend is raised at once.
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
                # before the whole unit is counted, whose parts must not be heard of after it
                self._ask(replica)
                yield index, made
            else:
                self._deaths[None] = 0
            self._feed(replica)

    def _ask(self, replica: Any) -> None:
        """Hear how far it is; one that does not answer is asked again later, and says all of it then."""
        if not issubclass(self._kind, CountedReplica):
            return
        with contextlib.suppress(self._ray.exceptions.RayError):
            told = self._ray.get(replica.how_far.remote(), timeout=_ANSWER_S)
            advance_within(told - self._heard[replica])
            self._heard[replica] = told

    def _start(self) -> None:
        # a thread more than units, to answer in
        replica = self._cluster.actor(self._kind, self._in_flight + 1).remote(*self._arguments)
        self._calls[replica.start.remote()] = (replica, None)

    def _feed(self, replica: Any) -> None:
        flying = [index for _, index in self._calls_of(replica)]
        if any(index in self._deaths for index in flying):
            return
        if self._suspects and not flying:
            # alone, so that nothing else is blamed for its deaths
            self._send(replica, self._suspects.popleft())
            return
        # the last units are not hoarded: another replica may be idle
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
        """Whatever state its engine is in, nobody uses it again; its units go to others."""
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
                    fix=f"see the replicas' own words in {self._cluster.keep_logs()}",
                )
            if one is not None:
                self._suspects.append(one)
        event(
            "replica_died", f"{self._stage}: a replica died ({why}); another takes its place", logging.WARNING, why=why
        )
        self._start()


def require_seen(work: Path, folder: Path, what: str) -> None:
    """Raise InputError where the machine of a replica does not see the folder of `what`, in which `work` lies."""
    if not work.is_dir():
        raise InputError(
            f"this machine does not see the {what}'s folder",
            where=f"{os.uname().nodename}:{folder}",
            expected="a file system that all machines of the cluster share",
            fix="set out to a folder there",
        )


class _ReplicaDiedError(Exception):
    """A replica's process is gone, or its engine cannot be trusted any more."""


def _cause_of_death(text: str) -> str:
    """Ray's essay in a few words."""
    for line in text.splitlines():
        _, mark, detail = line.partition("Worker exit detail: ")
        if mark:
            return detail.split(". ")[0]
    return text.splitlines()[0] if text else "no reason given"
