"""Stages that several processes of a benchmark share: one process makes each, and the others wait for it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile


def made_once(run: RunFile, stage: str, seed: int | None = None) -> StageInput:
    """Return the finished stage, and make it first if it is missing.

    Args:
        run: The run file; its folder `out` must lie directly in the benchmark's own folder, which holds the lock.
        stage: Name of the stage: corpus, teacher, cache or student.
        seed: Seed of a student.
    """
    instance = Instance(stage, seed=seed)  # type: ignore[arg-type]
    with shared_lock(Path(run.out).parent):
        return StageInput(Path(run.out) / instance.name, carry_out(run, instance))


def shared_lock(folder: Path) -> FileLock:
    """Return the lock that a process holds while it makes something in a benchmark's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "shared.lock")
