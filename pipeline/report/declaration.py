"""Declaration of the report stage, which belongs to every run that has an eval stage."""

from __future__ import annotations

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.declaration import Stage
from capgap.pipeline.stage.instances import (
    cache_inputs,
    corpus_inputs,
    final_trainings,
    measured_models,
    names,
    once,
    students,
    teacher_inputs,
    usual_roles,
)
from capgap.pipeline.stage.rounds import cache_of, last_texts, round_trainings, texts
from capgap.schemas.run_file import RunFile


def _inputs(run: RunFile, instance: Instance) -> list[str]:
    tasks = [] if run.benchmarks is None else measured_models(run, "benchmark", run.asks_teacher("benchmarks"))
    judged = [] if run.judge is None else ["judge"]
    made = [*corpus_inputs(run), *teacher_inputs(run), *cache_inputs(run), *names(students(run))]
    made += names(final_trainings(run))
    return list(dict.fromkeys([*made, "eval", *names(tasks), *judged, *_of_rounds(run)]))


def _of_rounds(run: RunFile) -> list[str]:
    """Return the names of all instances that write, score or train in rounds."""
    if run.rounds is None:
        return []
    written = texts(run)
    return names([*written, *map(cache_of, written), *round_trainings(run), *last_texts(run)])


STAGE = Stage(
    name="report",
    help="write one HTML page and one table of what was measured",
    code="capgap.pipeline.report.stage",
    section="eval",
    instances=lambda run: once("report", "eval", run),
    inputs=_inputs,
    roles=usual_roles,
    settings=lambda run, instance: {"name": run.name, "arms": sorted(run.arms)},
)
