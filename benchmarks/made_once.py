"""Stages that several processes of a benchmark share: one of them makes each, and the others wait for it."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from capgap.pipeline.stage.context import Instance, StageInput
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile


def made_once(run: RunFile, stage: str, seed: int | None = None) -> StageInput:
    """The finished stage, made if it is not.

    Args:
        run: whose folder `out` lies in the benchmark's own folder, as those of all stages that are shared do.
        stage: corpus, teacher, cache or student.
        seed: of a student.
    """
    instance = Instance(stage, seed=seed)  # type: ignore[arg-type]
    with shared_lock(Path(run.out).parent):
        return StageInput(Path(run.out) / instance.name, carry_out(run, instance))


def shared_lock(folder: Path) -> FileLock:
    """Held by the one process that makes something in a benchmark's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "shared.lock")
