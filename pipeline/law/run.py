"""Carries out a grid: first the corpus, then teachers and cells in parallel processes, then the table.

corpus --> TEACHER: teacher, cache --> STUDENT x TEACHER x seed: first weights, trainings, measurement --> table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from capgap.pipeline.law.devices import worker_environments
from capgap.pipeline.law.expand import corpus_run, write_run_file
from capgap.pipeline.law.kept import require_corpus_kept, require_jobs_kept
from capgap.pipeline.law.outcome import made_stages
from capgap.pipeline.law.pool import Pool, Starter
from capgap.pipeline.law.progress import GridProgress
from capgap.pipeline.law.pruned import require_cuts
from capgap.pipeline.law.sizes import sizes_of, vocab_size_of_grid
from capgap.pipeline.law.steps import require_steps
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.device import resolve_device
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.folder import LOCK_NAME, in_use
from capgap.pipeline.store.locks import ProcessLock
from capgap.pipeline.workflow.driver import start_afresh, walk
from capgap.schemas.law_grid import LawGrid


@dataclass(frozen=True)
class Done:
    """The outcome of carrying out a grid.

    Attributes:
        table: Path of the table.
        made: Names of the jobs that were started; current ones are not.
        missing: The reason why a run has no result, by the name of the run.
        num_runs: Number of rows of the table.
    """

    table: Path
    made: tuple[str, ...]
    missing: dict[str, str]
    num_runs: int


def run_grid(
    grid: LawGrid,
    num_workers: int | None = None,
    *,
    wait: bool = True,
    replace: bool = False,
    on_cpu: Starter | None = None,
) -> Done:
    """Make every run of the grid that is not current, and write the table.

    Args:
        grid: The grid.
        num_workers: Number of parallel processes; by default one for each core or for each group of GPUs.
        wait: Whether to wait for a device that another run holds; if not, the run fails.
        replace: Whether finished stages that cost device time are replaced where their settings have changed.
        on_cpu: Starter of stages on a CPU. By default, and on GPUs, stages are started as fresh processes.

    Raises:
        StageFailedError: The corpus could not be made.
        MachineError: Another process works on the grid, or the machine has too few GPUs.
        SettingError, MismatchError, InputError: The grid, or something that it reuses, cannot be used.
        MismatchError: Something that cost device time would be replaced.
    """
    require_steps(grid)
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
        if not replace:
            require_corpus_kept(grid)
        made = _make_corpus(grid, wait)
        progress = GridProgress(grid)
        if not replace:
            require_jobs_kept(grid, [*progress.teacher_jobs(), *progress.cell_jobs()])
        progress.write()
        try:
            made += Pool(environments, wait, progress, starter, lock).carry_out()
        finally:
            progress.write()
        rows = progress.rows()
        missing = {row.name: row.missing for row in rows if row.missing is not None}
        return Done(progress.table_path, tuple(made), missing, len(rows))


def gather(grid: LawGrid) -> Path:
    """Write the table of the results that exist, without running anything, and return its path.

    Raises:
        InputError: The corpus is not made.
    """
    progress = GridProgress(grid)
    progress.write()
    return progress.table_path


def _make_corpus(grid: LawGrid, wait: bool) -> list[str]:
    run = corpus_run(grid)
    write_run_file(run)
    if made_stages(run, ["corpus"]):
        return []
    # replacing is safe: without the user's permission, `run_grid` has already refused to lose what cost device time
    return walk(run, [Instance("corpus")], log=_log, replace=True, wait=wait)


def _log(name: str, why: str) -> None:
    event("stage_checked", f"{name}: {why}", instance=name, why=why)
