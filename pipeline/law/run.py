"""Carries out a grid: the corpus, then teachers and cells in processes side by side, then table, fit and page.

    corpus --> TEACHER: teacher, cache --> STUDENT x TEACHER x seed: first weights, trainings, measurement --> table

Workers on a CPU have one thread each and share the CPU's lease, which no other run has meanwhile. On GPUs each worker
sees devices of its own and every stage takes the lease on them, so teacher and student never meet on one.
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

from capgap.pipeline.law.devices import worker_environments
from capgap.pipeline.law.expand import Cell, cell, cells, corpus_run, teacher_run, write_run_file
from capgap.pipeline.law.gather import (
    Outcome,
    Sizes,
    corpus_manifest,
    is_finished,
    is_made,
    outcome_of,
    rows,
    sizes_of,
    vocab_size_of_grid,
)
from capgap.pipeline.law.pruned import require_cuts
from capgap.pipeline.law.reused import require_reused
from capgap.pipeline.law.table import write_table
from capgap.pipeline.law.worker import INTERRUPTED, Job, cell_job, process_of, read_failures, teacher_job
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.folder import LOCK_NAME, in_use
from capgap.pipeline.stage.locks import ProcessLock
from capgap.pipeline.workflow.driver import Start, start_afresh, walk
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.law import LawRun
from capgap.schemas.law_grid import LawGrid

TABLE_NAME = "runs.jsonl"

_POLL_S = 0.05
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Done:
    """What a run of the grid ended in.

    Attributes:
        table: path of the table.
        made: names of the jobs that had something to do.
        missing: why each run without a result has none, by name.
        num_runs: rows of the table.
    """

    table: Path
    made: tuple[str, ...]
    missing: dict[str, str]
    num_runs: int


@dataclass(frozen=True)
class Starter:
    """How the processes of stages are started on a CPU.

    Attributes:
        prepare: called once, before the first.
        start: starts one.
    """

    prepare: Callable[[], None]
    start: Start


def run_grid(
    grid: LawGrid, num_workers: int | None = None, *, wait: bool = True, on_cpu: Starter | None = None
) -> Done:
    """Make every run of the grid that is not current, and write the table.

    Args:
        grid: the grid.
        num_workers: processes side by side; one a core or a group of GPUs where it is left out.
        wait: wait for a device that another run holds.
        on_cpu: how stages are started there; as fresh processes where it is left out, and on GPUs.

    Raises:
        StageFailedError: the corpus could not be made.
        MachineError: another process is at work on the grid, or there are no such devices.
        SettingError, MismatchError, InputError: the grid, or something it reuses, cannot be used.
    """
    if "pruned" in grid.inits:
        require_cuts(grid)
        sizes_of(grid, vocab_size_of_grid(grid))
    Path(grid.out).mkdir(parents=True, exist_ok=True)
    with ProcessLock(Path(grid.out) / LOCK_NAME) as lock:
        if not lock.exclusive():
            raise in_use(Path(grid.out))
        device = resolve_device(grid.device)
        environments = worker_environments(grid, device, num_workers)
        starter = on_cpu if device == "cpu" and on_cpu is not None else Starter(lambda: None, start_afresh)
        made = _make_corpus(grid, wait)
        work = _Work(grid)
        work.write()
        try:
            made += _Workers(environments, wait, work, starter, lock).carry_out()
        finally:
            work.write()
        missing = {row.name: row.missing for row in work.rows() if row.missing is not None}
        return Done(table_path(grid), tuple(made), missing, len(work.rows()))


def gather(grid: LawGrid) -> Path:
    """Write the table of what is there, and run nothing; returns its path.

    Raises:
        InputError: the corpus is not made.
    """
    _Work(grid).write()
    return table_path(grid)


def table_path(grid: LawGrid) -> Path:
    """Where the table is."""
    return Path(grid.out) / TABLE_NAME


def tokens_by_student(grid: LawGrid, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Targets of every budget, by student and budget."""
    return {
        student: {name: budget.tokens_of(size.num_parameters) for name, budget in grid.budgets.items()}
        for student, size in sizes.students.items()
    }


def _make_corpus(grid: LawGrid, wait: bool) -> list[str]:
    run = corpus_run(grid)
    write_run_file(run)
    if is_made(run, ["corpus"]):
        return []
    return walk(run, [Instance("corpus")], log=_say, wait=wait)


def _say(name: str, why: str) -> None:
    event("stage_checked", f"{name}: {why}", instance=name, why=why)


class _Work:
    """What there is to do, and what became of it so far."""

    def __init__(self, grid: LawGrid) -> None:
        self._grid = grid
        corpus = corpus_manifest(grid)
        self._sizes = sizes_of(grid, CorpusFacts.model_validate(corpus.facts).tokenizer.vocab_size)
        self._tokens = tokens_by_student(grid, self._sizes)
        _require_text(grid, self._tokens, corpus.shard_sets["student"].num_tokens)
        require_reused(grid, corpus)
        self.cells: dict[str, Cell] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._teachers = {name: teacher_run(grid, name) for name in grid.teachers}
        for one in cells(grid, self._tokens):
            chosen = self._finished_with_another(one) if one.teacher is None else one
            self.cells[one.name] = chosen
            self.outcomes[one.name] = outcome_of(chosen, self._why_not(chosen.reads))

    def _finished_with_another(self, one: Cell) -> Cell:
        """A supervised cell that has read the text of another teacher's cache is as good: it is the same text."""
        for teacher in self._grid.teachers:
            other = cell(self._grid, one.student, None, one.seed, self._tokens[one.student], teacher)
            if is_finished(other):
                return other
        return one

    def teacher_jobs(self) -> list[Job]:
        """Of teachers whose teacher or cache is not current, the largest first."""
        found = []
        for name in sorted(self._teachers, key=lambda name: -self._sizes.teachers[name].num_parameters):
            run = self._teachers[name]
            if not is_made(run, ("teacher", "cache")):
                found.append(teacher_job(_teacher_name(name), run))
        return found

    def cell_jobs(self) -> list[Job]:
        """Of cells that are not finished: seed by seed, for a seed counts when it is complete; the longest first."""
        pending = [one for one in self.cells.values() if not is_finished(one)]
        pending.sort(key=lambda one: (self._grid.seeds.index(one.seed), -self._cost(one)))
        return [cell_job(one, _teacher_name(one.reads)) for one in pending]

    def failed(self, job: Job, code: int) -> None:
        """Take note that a job failed; what else it has made counts."""
        if job.name in self.cells:
            why = "" if read_failures(job.run) else _ended(code)
            self.outcomes[job.name] = outcome_of(self.cells[job.name], why)

    def without(self, job: Job, failed: Mapping[str, int]) -> Job | None:
        """A cell's job whose teacher failed: of a supervised one another that reads another cache, else None."""
        one = self.cells[job.name]
        lost = {name for name in self._grid.teachers if _teacher_name(name) in failed}
        left = [name for name in self._grid.teachers if name not in lost]
        if one.teacher is None and left:
            other = cell(self._grid, one.student, None, one.seed, self._tokens[one.student], left[0])
            self.cells[job.name] = other
            return cell_job(other, _teacher_name(left[0]))
        why = self._why_not(one.reads) or f"{_teacher_name(one.reads)}: {_ended(failed[_teacher_name(one.reads)])}"
        self.outcomes[job.name] = outcome_of(one, why)
        return None

    def ended_well(self, job: Job) -> None:
        """Take note of a job's results."""
        if job.name in self.cells:
            self.outcomes[job.name] = outcome_of(self.cells[job.name])

    def rows(self) -> list[LawRun]:
        """The table."""
        return rows(self._grid, self.cells.values(), self.outcomes, self._sizes, self._tokens)

    def write(self) -> None:
        """Write the table."""
        write_table(table_path(self._grid), self.rows())

    def _why_not(self, teacher: str) -> str:
        """Why a teacher or its cache could not be made when it was last tried; empty where nothing is known."""
        said = read_failures(self._teachers[teacher])
        return "; ".join(f"{_teacher_name(teacher)}, {name}: {why}" for name, why in said.items())

    def _cost(self, one: Cell) -> float:
        size = self._sizes.students[one.student].num_parameters
        return size * sum(self._tokens[one.student][arm.budget] for arm in one.arms)


class _Workers:
    """Processes side by side, each at one job; whoever is free takes the next that can be done."""

    def __init__(
        self,
        environments: Sequence[Mapping[str, str]],
        wait: bool,
        work: _Work,
        starter: Starter,
        lock: ProcessLock,
    ) -> None:
        self._free = list(environments)
        self._wait, self._work, self._starter, self._lock = wait, work, starter, lock
        self._running: list[tuple[BaseProcess, Job, Mapping[str, str], float]] = []
        self._failed: dict[str, int] = {}
        self._interrupted = False

    def carry_out(self) -> list[str]:
        """Do all that can be done; names of the jobs that were started.

        Raises:
            KeyboardInterrupt: this process or a worker was interrupted.
        """
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            return self._carry_out()
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # Python swallows what is raised in the hooks around a fork
        self._interrupted = True
        raise KeyboardInterrupt

    def _carry_out(self) -> list[str]:
        waiting = [*self._work.teacher_jobs(), *self._work.cell_jobs()]
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
        """Jobs that can still be done."""
        left = []
        for job in waiting:
            if any(need in self._failed for need in job.needs):
                other = self._work.without(job, self._failed)
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
        """Take leave of the processes that have ended; whether there was one."""
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
                self._work.failed(job, code)
                text = f"{job.name}: FAILED after {wall_s} s ({done}); {Path(job.run.out)}"
                event("law_failed", text, run=job.name, wall_s=wall_s, exit_code=code)
            else:
                self._work.ended_well(job)
                event("law_done", f"{job.name}: done in {wall_s} s ({done})", run=job.name, wall_s=wall_s)
        if gone:
            self._work.write()
        return bool(gone)

    def _stop(self) -> None:
        """End all of them: as an interrupt would, and by force where that does not help."""
        for number in (signal.SIGINT, signal.SIGKILL):
            for process, _, _, _ in self._running:
                with suppress(ProcessLookupError):
                    if process.is_alive() and process.pid is not None:
                        os.kill(process.pid, number)
            deadline = time.monotonic() + _PATIENCE_S
            for process, _, _, _ in self._running:
                process.join(max(0.0, deadline - time.monotonic()))


def _teacher_name(name: str) -> str:
    return f"teachers/{name}"


def _ended(code: int) -> str:
    return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def _require_text(grid: LawGrid, tokens: Mapping[str, Mapping[str, int]], num_tokens: int) -> None:
    """Refuse budgets that the student's text does not hold: such a run would end early, and not say so."""
    for student, of in tokens.items():
        settings = grid.train_settings(student)
        cached = min(num_tokens, grid.cache.max_tokens or num_tokens)
        for budget, asked in of.items():
            if asked > cached * settings.num_epochs:
                raise SettingError(
                    "the budget is larger than the cached text",
                    where=f"budgets.{budget}, {student}",
                    found=f"{asked:,} tokens",
                    expected=f"at most {cached * settings.num_epochs:,}",
                    fix="give more text, raise cache.max_tokens, or train.num_epochs if tokens may be seen again",
                )
            if asked < settings.batch_sequences * grid.corpus.seq_len:
                raise InputError(
                    "the budget is smaller than a step",
                    where=f"budgets.{budget}, {student}",
                    found=f"{asked:,} tokens",
                    expected=f"at least {settings.batch_sequences * grid.corpus.seq_len:,}",
                )
