"""The benchmark stage's check before anything of a run is made."""

from __future__ import annotations

from capgap.pipeline.benchmark.tasks import check_tasks
from capgap.schemas.run_file import RunFile


def require_tasks(run: RunFile) -> None:
    """Refuse benchmarks that the stage would refuse hours later; raises what `check_tasks` raises.

    Building lm-eval's list of tasks takes some ten seconds, which are little beside a training that ends in an error.
    """
    assert run.benchmarks is not None
    check_tasks(run.benchmarks)
