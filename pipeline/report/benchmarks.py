"""Builds the table of benchmarks, with a line for each task and a column for the teacher and for each arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from capgap.pipeline.report.summary import BenchmarkLine, Benchmarks, Score
from capgap.pipeline.stage.context import StageContext
from capgap.schemas.benchmark import BENCHMARK_NAME, BenchmarkResults
from capgap.schemas.results import TEACHER

_Value = tuple[float, float | None]

# Column of a given model that was tuned: it belongs to no arm.
_TUNED = "tuned"


def benchmarks(context: StageContext) -> Benchmarks | None:
    """Collect the results of the run's benchmark stages; None where it has none."""
    found: dict[str, list[BenchmarkResults]] = {}
    for name, made in context.inputs.items():
        if made.manifest.stage == "benchmark":
            results = BenchmarkResults.model_validate_json((made.path / BENCHMARK_NAME).read_bytes())
            found.setdefault(_column(name), []).append(results)
    if not found:
        return None
    models = {name: found[name] for name in (TEACHER, *context.run.arms, _TUNED) if name in found}
    return Benchmarks(lines=(*_tasks(models), *_means(models)), notes=_notes(models))


def benchmark_headings(table: Benchmarks) -> tuple[str, ...]:
    """Return the headings of the columns."""
    return ("task", "metric", "shots", "chance", *table.lines[0].scores)


def benchmark_cells(table: Benchmarks, errors: bool = True) -> list[tuple[str, ...]]:
    """Format the lines as one text for each heading; `errors` says whether the scores' errors are shown."""
    return [
        (
            line.task,
            line.metric,
            "-" if line.num_fewshot is None else str(line.num_fewshot),
            "-" if line.chance is None else f"{line.chance:.4f}",
            *(_text(score, errors) for score in line.scores.values()),
        )
        for line in table.lines
    ]


def _column(instance: str) -> str:
    """Return the column of an instance: its arm, `teacher`, or `tuned` for `benchmark/seed-N`, which has no arm."""
    _, first, *seed = instance.split("/")
    return first if seed or first == TEACHER else _TUNED


def _tasks(models: dict[str, list[BenchmarkResults]]) -> Iterable[BenchmarkLine]:
    """Return the line of each task; all models have the same tasks, because one run file names them."""
    first = next(iter(models.values()))[0]
    for place, row in enumerate(first.main):
        scores = {
            name: _score([(one.main[place].value, one.main[place].stderr) for one in results])
            for name, results in models.items()
        }
        alone = sum(other.asked == row.asked for other in first.main) == 1
        yield BenchmarkLine(
            task=row.asked if alone else row.task,
            metric=row.metric if row.filter == "none" else f"{row.metric}, {row.filter}",
            num_fewshot=row.num_fewshot,
            chance=row.chance,
            scores=scores,
        )


def _means(models: dict[str, list[BenchmarkResults]]) -> Iterable[BenchmarkLine]:
    first = next(iter(models.values()))[0]
    for place, mean in enumerate(first.means):
        scores = {
            name: _score([(one.means[place].value, one.means[place].stderr) for one in results])
            for name, results in models.items()
        }
        yield BenchmarkLine(
            task=mean.preset, metric=f"mean of {len(mean.tasks)}", num_fewshot=None, chance=None, scores=scores
        )


def _score(values: Sequence[_Value]) -> Score:
    mean = math.fsum(value for value, _ in values) / len(values)
    if len(values) == 1:
        return Score(mean=mean, error=values[0][1])
    variance = math.fsum((value - mean) ** 2 for value, _ in values) / (len(values) - 1)
    return Score(mean=mean, error=math.sqrt(variance))


def _notes(models: dict[str, list[BenchmarkResults]]) -> tuple[str, ...]:
    every = [one for results in models.values() for one in results]
    conditions = [way for one in every for way in (one, *one.earlier.values())]
    ways = sorted({f"{one.backend}, {one.dtype}" for one in conditions})
    versions = sorted({one.versions["lm-eval"] for one in conditions})
    seeds = any(len(results) > 1 for results in models.values())
    errors = "+- is lm-eval's standard error over examples" + (", of several seeds their deviation" if seeds else "")
    notes = [f"benchmarks: lm-eval {', '.join(versions)} through {' and '.join(ways)}; {errors}"]
    limit = every[0].limit
    if limit is not None:
        notes.append(f"limited: the first {limit} examples of each task only; a trial, not the benchmarks' own figures")
    return tuple(notes)


def _text(score: Score, errors: bool) -> str:
    return f"{score.mean:.4f}" if score.error is None or not errors else f"{score.mean:.4f} +- {score.error:.4f}"
