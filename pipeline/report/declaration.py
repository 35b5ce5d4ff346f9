"""What the rest of the pipeline knows of the report stage, which every run has that measures something."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import (
    cache_inputs,
    corpus_inputs,
    measured_models,
    names,
    once,
    students,
    teacher_inputs,
    trainings,
)
from capgap.schemas.run_file import RunFile


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    tasks = [] if run.benchmarks is None else measured_models(run, "benchmark", run.asks_teacher("benchmarks"))
    judged = [] if run.judge is None else ["judge"]
    made = [
        *corpus_inputs(run),
        *teacher_inputs(run),
        *cache_inputs(run),
        *names(students(run)),
        *names(trainings(run)),
    ]
    return [*made, "eval", *names(tasks), *judged]


STAGE = Stage(
    name="report",
    help="write one HTML page and one table of what was measured",
    code="capgap.pipeline.report.stage",
    section="eval",
    instances=lambda run: once("report", "eval", run),
    inputs=_inputs,
    settings=lambda run, instance: {"name": run.name, "arms": sorted(run.arms)},
)
