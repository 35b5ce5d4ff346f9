"""Carries out one job of a grid in a process of its own: the stages of one run file, walked like those of any run.

Failures are written to a file beside the run file, so that the table can name the reason in every later command.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from capgap.pipeline.law.expand import Cell, write_run_file
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.orphans import die_with
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.driver import StageFailedError, Start, start_afresh, walk
from capgap.schemas.errors import CapgapError
from capgap.schemas.run_file import RunFile

FAILED_NAME = "failed.json"
LOG_NAME = "log.txt"

INTERRUPTED = 130
"""Exit code of a worker that was interrupted."""

_FAULT = 1


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        name: Path of the run's folder below the grid's folder.
        run: The run file.
        first: Instances that all other instances of the job need, in order.
        each: Instances that do not depend on each other, so that one may fail without stopping the others: the
            trainings of a cell.
        measured: Whether the eval stage measures the trainings that have succeeded.
        needs: Names of the jobs that must have succeeded before.
    """

    name: str
    run: RunFile
    first: tuple[Instance, ...]
    each: tuple[Instance, ...] = ()
    measured: bool = False
    needs: tuple[str, ...] = ()


def teacher_job(name: str, run: RunFile) -> Job:
    """Return the job that makes a teacher and its cache, as far as they are not reused."""
    stages = [Instance("teacher"), Instance("cache")]
    return Job(name, run, tuple(one for one in stages if one.stage not in run.reuse))


def cell_job(cell: Cell, needs: str) -> Job:
    """Return the job that makes a cell's first weights, trainings and measurement; `needs` names its teacher's job."""
    student = Instance("student", seed=cell.seed)
    return Job(cell.name, cell.run, (student,), tuple(map(cell.trained, cell.arms)), True, (needs,))


def with_arms(run: RunFile, trained: Sequence[Instance]) -> RunFile:
    """Return the run with the trained arms only, so that they can be measured although another arm has failed."""
    arms = {one.arm for one in trained}
    return run.model_copy(update={"arms": {name: values for name, values in run.arms.items() if name in arms}})


def begin_log(job: Job) -> Path:
    """Write the run file, remove the failures of the last attempt, and return the path of a new, empty log."""
    write_run_file(job.run)
    (Path(job.run.out) / FAILED_NAME).unlink(missing_ok=True)
    log = Path(job.run.out) / LOG_NAME
    log.write_bytes(b"")
    return log


def read_failures(run: RunFile) -> dict[str, str]:
    """Read why instances of the run failed in the last attempt, by the instance's name."""
    with suppress(FileNotFoundError, ValueError):
        found = json.loads((Path(run.out) / FAILED_NAME).read_bytes())
        return {str(name): str(why) for name, why in found.items()} if isinstance(found, dict) else {}
    return {}


def process_of(
    job: Job, environment: Mapping[str, str], wait: bool, start: Start, leave: Callable[[], None]
) -> BaseProcess:
    """Begin the log of a job and return its process, which is not started yet.

    The process is forked, because what it needs is imported in this process already.

    Args:
        job: The job.
        environment: Environment variables that the process adds to those of this process.
        wait: Whether stages wait for a device that another run holds.
        start: Function that starts the processes of the job's stages.
        leave: Function that the new process calls to let go of what only this process may hold, such as a lock.
    """
    # imported here, because commands that start no process do not need it
    import multiprocessing

    log = begin_log(job)
    fork = multiprocessing.get_context("fork")
    arguments = (job, dict(environment), log, wait, start, leave, os.getpid())
    return fork.Process(target=_be_the_worker, args=arguments, name=job.name)


def _be_the_worker(
    job: Job,
    environment: Mapping[str, str],
    log: Path,
    wait: bool,
    start: Start,
    leave: Callable[[], None],
    parent_pid: int,
) -> None:
    die_with(parent_pid)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = _FAULT
    try:
        code = carry_out_job(job, log, wait, start)
    except KeyboardInterrupt:
        code = INTERRUPTED
    os._exit(code)


def carry_out_job(job: Job, log: Path, wait: bool, start: Start = start_afresh) -> int:
    """Make everything of the job that can be made, and return the exit code of the first failure, or 0."""
    failures: dict[str, str] = {}
    codes: list[int] = []

    def made(run: RunFile, instance: Instance) -> bool:
        log_bytes = log.stat().st_size
        try:
            walk(run, [instance], log=_log, replace=True, wait=wait, start=_start_of(run, instance, start))
        except CapgapError as error:
            logged = (
                _last_words(log, log_bytes)
                if isinstance(error, StageFailedError) and error.already_said
                else str(error)
            )
            failures[instance.name] = logged or str(error)
            codes.append(error.exit_code)
            if error.exit_code == INTERRUPTED:
                raise KeyboardInterrupt from None
            return False
        return True

    if all(made(job.run, instance) for instance in job.first):
        trained = [instance for instance in job.each if made(job.run, instance)]
        if job.measured and trained:
            made(with_arms(job.run, trained), Instance("eval"))
    if failures:
        write_atomically(Path(job.run.out) / FAILED_NAME, json.dumps(failures, indent=1) + "\n")
    return codes[0] if codes else 0


def _log(name: str, why: str) -> None:
    print(f"{name}: {why}", flush=True)


def _start_of(run: RunFile, instance: Instance, start: Start) -> Start:
    """Return the function that starts the instance; vLLM needs a fresh process, in which nothing was imported."""
    return start_afresh if instance.stage == "cache" and run.cache.engine == "vllm" else start


def _last_words(log: Path, start: int) -> str:
    """Return the reason in the log's last line that begins with `capgap: `; empty without such a line."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.removeprefix("capgap: ") for line in reversed(lines) if line.startswith("capgap: ")), "")
