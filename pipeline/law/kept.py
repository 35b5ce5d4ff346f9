"""Keeps a forgotten setting from making a grid replace what an earlier run of it has made.

Finished teachers, caches and trainings in the grid's folders are compared with the grid's present settings, before the
corpus is changed and before the first job begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from capgap.pipeline.law.expand import corpus_run
from capgap.pipeline.law.worker import Job
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.stages import stage_named
from capgap.pipeline.workflow.remake import lost_stages, would_be_replaced
from capgap.pipeline.workflow.state import RunStates
from capgap.schemas.errors import InputError
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.manifest import MANIFEST_NAME
from capgap.schemas.run_file import RunFile

_RESTORE, _PERMISSION = "restore what changed", "--replace"


def require_corpus_kept(grid: LawGrid) -> None:
    """Refuse to replace the corpus where finished stages of the grid have read it, or where it is partly made.

    Raises:
        MismatchError: Finished stages, or a partly made corpus, would be replaced.
        CorruptError: A manifest cannot be read.
    """
    run = corpus_run(grid)
    states = RunStates(run)
    if "corpus" in states.reused:
        return
    if begun := [(one.name, why) for one, why in lost_stages(states, [Instance("corpus")])]:
        raise would_be_replaced(grid.out, begun, _RESTORE, _PERMISSION)
    if why := states.of("corpus").replaced:
        lost = [(name, f"corpus: {why}") for name in _costly_folders(grid, run)]
        if lost:
            raise would_be_replaced(grid.out, lost, _RESTORE, _PERMISSION)


def require_jobs_kept(grid: LawGrid, jobs: Sequence[Job]) -> None:
    """Refuse jobs of the grid that would replace what has cost device time.

    Raises:
        MismatchError: A job would replace a finished stage that has cost device time.
        CorruptError: A manifest cannot be read.
    """
    lost = []
    for job in jobs:
        states = _states(job)
        found = [] if states is None else lost_stages(states, (*job.first, *job.each))
        lost += [(f"{job.name}/{instance.name}", why) for instance, why in found]
    if lost:
        raise would_be_replaced(grid.out, lost, _RESTORE, _PERMISSION)


def _states(job: Job) -> RunStates | None:
    try:
        return RunStates(job.run)
    except InputError:  # what the job reads is not made yet, so the job has made nothing either
        return None


def _costly_folders(grid: LawGrid, run: RunFile) -> Iterator[str]:
    """Yield the finished stages of the grid that have cost device time, as paths below the grid's folder."""
    for path in sorted(Path(grid.out).glob(f"*/*/**/{MANIFEST_NAME}")):
        manifest = read_manifest(path.parent)
        if manifest is not None and stage_named(manifest.stage).is_costly(run, Instance(manifest.stage)):
            yield str(path.parent.relative_to(grid.out))
