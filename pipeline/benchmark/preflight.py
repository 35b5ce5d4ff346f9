"""The benchmark stage's check before anything of a run is made."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.benchmark.tasks import require_lm_eval
from capgap.schemas.errors import InputError
from capgap.schemas.run_file import RunFile


def require_tasks(run: RunFile) -> None:
    """Refuse benchmarks if lm-eval is not installed, or the folder of the user's own tasks is missing.

    Raises:
        MachineError: lm-eval is not installed.
        InputError: The folder does not exist.
    """
    assert run.benchmarks is not None
    require_lm_eval()
    folder = run.benchmarks.include_path
    if folder is not None and not Path(folder).is_dir():
        raise InputError("no such folder", where=f"benchmarks.include_path: {folder}", expected="a folder of tasks")
