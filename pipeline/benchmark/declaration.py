"""The declaration of the benchmark stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import maker_of, measured_models
from capgap.schemas.run_file import RunFile


def _instances(run: RunFile) -> list[Instance]:
    if run.benchmarks is None:
        return []
    return measured_models(run, "benchmark", run.asks_teacher("benchmarks"))


def _decisive(run: RunFile, instance: Instance) -> dict[str, Any]:
    assert run.benchmarks is not None
    return {"benchmarks": run.benchmarks.decisive()}


def _sources(run: RunFile, instance: Instance) -> list[Path]:
    if run.benchmarks is None or run.benchmarks.include_path is None:
        return []
    # imported here, because code that only reads manifests needs nothing of lm-eval's tasks
    from capgap.pipeline.benchmark.own_tasks import task_files

    return task_files(Path(run.benchmarks.include_path))


STAGE = Stage(
    name="benchmark",
    help="measure models on tasks of lm-eval",
    code="capgap.pipeline.benchmark.stage",
    section="benchmarks",
    instances=_instances,
    inputs=lambda run, instance: [maker_of(run, instance)],
    settings=_decisive,
    sources=_sources,
    on_device=True,
    preflight="capgap.pipeline.benchmark.preflight:require_tasks",
)
