"""Runs the jobs of a grid in parallel processes.

Workers on a CPU have one thread each and share the CPU's lease, so no other run holds it meanwhile. On GPUs each worker
has devices of its own and every stage takes the lease on them, so teacher and student are never on one device at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from capgap.pipeline.law.progress import GridProgress
from capgap.pipeline.law.worker import INTERRUPTED, Job, process_of
from capgap.pipeline.stage.events import event
from capgap.pipeline.store.locks import ProcessLock
from capgap.pipeline.workflow.driver import Start

_POLL_S = 0.05
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Starter:
    """How the processes of stages are started on a CPU.

    Attributes:
        prepare: Function that is called once, before the first process.
        start: Function that starts one process.
    """

    prepare: Callable[[], None]
    start: Start


class Pool:
    """Parallel worker processes; whenever one is free, the next job whose needs are met is started.

    Args:
        environments: Environment variables of each worker, beside those of this process.
        wait: Whether stages wait for a device that another run holds.
        progress: The jobs of the grid and their results.
        starter: How stages are started on a CPU.
        lock: Lock on the grid's folder, which workers let go of so that only this process holds it.
    """

    def __init__(
        self,
        environments: Sequence[Mapping[str, str]],
        wait: bool,
        progress: GridProgress,
        starter: Starter,
        lock: ProcessLock,
    ) -> None:
        self._free = list(environments)
        self._wait, self._progress, self._starter, self._lock = wait, progress, starter, lock
        self._running: list[tuple[BaseProcess, Job, Mapping[str, str], float]] = []
        self._failed: dict[str, int] = {}
        self._interrupted = False

    def carry_out(self) -> list[str]:
        """Run all jobs that can be done, and return the names of the jobs that were started.

        Raises:
            KeyboardInterrupt: This process or a worker was interrupted.
        """
        before = signal.signal(signal.SIGINT, self._interrupt)
        try:
            return self._carry_out()
        finally:
            signal.signal(signal.SIGINT, before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # an exception that is raised in the hooks around a fork is lost in Python, so a flag is set too
        self._interrupted = True
        raise KeyboardInterrupt

    def _carry_out(self) -> list[str]:
        waiting = [*self._progress.teacher_jobs(), *self._progress.cell_jobs()]
        total, started = len(waiting), []
        if waiting:
            self._starter.prepare()
        try:
            while waiting or self._running:
                if self._interrupted:
                    raise KeyboardInterrupt
                waiting = self._without_lost(waiting)
                job = self._next(waiting)
                if job is not None:
                    waiting.remove(job)
                    self._start(job)
                    started.append(job.name)
                elif not self._ended(total, len(waiting)):
                    time.sleep(_POLL_S)
        except BaseException:
            self._stop()
            raise
        return started

    def _without_lost(self, waiting: list[Job]) -> list[Job]:
        """Return the jobs that can still be done, with a replacement for supervised cells whose cache failed."""
        left = []
        for job in waiting:
            if any(need in self._failed for need in job.needs):
                other = self._progress.without(job, self._failed)
                left += [other] if other is not None else []
            else:
                left.append(job)
        return left

    def _next(self, waiting: Sequence[Job]) -> Job | None:
        if not self._free:
            return None
        open_names = {job.name for job in waiting} | {job.name for _, job, _, _ in self._running}
        return next((job for job in waiting if not any(need in open_names for need in job.needs)), None)

    def _start(self, job: Job) -> None:
        environment = self._free.pop(0)
        sys.stdout.flush()
        process = process_of(job, environment, self._wait, self._starter.start, self._lock.close)
        process.start()
        self._running.append((process, job, environment, time.monotonic()))
        event("law_started", f"{job.name}: begun", run=job.name)

    def _ended(self, total: int, num_waiting: int) -> bool:
        """Record the processes that have ended, and return whether there was one."""
        gone = [one for one in self._running if not one[0].is_alive()]
        for one in gone:
            process, job, environment, began = one
            process.join()
            self._running.remove(one)
            self._free.append(environment)
            wall_s = round(time.monotonic() - began, 1)
            done = f"{total - num_waiting - len(self._running)} of {total}"
            code = process.exitcode or 0
            self._interrupted |= code == INTERRUPTED
            if code:
                self._failed[job.name] = code
                self._progress.failed(job, code)
                text = f"{job.name}: FAILED after {wall_s} s ({done}); {Path(job.run.out)}"
                event("law_failed", text, run=job.name, wall_s=wall_s, exit_code=code)
            else:
                self._progress.ended_well(job)
                event("law_done", f"{job.name}: done in {wall_s} s ({done})", run=job.name, wall_s=wall_s)
        if gone:
            self._progress.write()
        return bool(gone)

    def _stop(self) -> None:
        """End all processes: by SIGINT first, and by SIGKILL if one is still alive after some seconds."""
        for number in (signal.SIGINT, signal.SIGKILL):
            for process, _, _, _ in self._running:
                with suppress(ProcessLookupError):
                    if process.is_alive() and process.pid is not None:
                        os.kill(process.pid, number)
            deadline = time.monotonic() + _PATIENCE_S
            for process, _, _, _ in self._running:
                process.join(max(0.0, deadline - time.monotonic()))
