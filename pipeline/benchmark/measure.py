"""The measurement of one model on one task by lm-eval, with the results as rows."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from capgap.pipeline.benchmark.own_tasks import sandboxed_templates
from capgap.pipeline.benchmark.presets import Asked
from capgap.pipeline.benchmark.tasks import seed_examples
from capgap.schemas.benchmark import BenchmarkMean, BenchmarkRow
from capgap.schemas.errors import CapgapError, InputError, SettingError
from capgap.schemas.run_benchmark import BenchmarkSettings

_NUM_BOOTSTRAP = 1000
"""Number of bootstrap resamples behind the errors of metrics that are no mean; errors of means have a formula."""

# raised by a task that does not fit its data, or that asks for more examples than there are
_OF_THE_TASK = (ValueError, AssertionError, KeyError, IndexError, TypeError, AttributeError)


def measure(lm: Any, loaded: Mapping[str, Any], asked: Asked, settings: BenchmarkSettings) -> tuple[BenchmarkRow, ...]:
    """Return every metric of the task, or of the group and its tasks, the main ones first.

    Raises:
        InputError: The task does not fit its data or the model, or reports no number.
        SettingError: The task has no such metric.
    """
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    seed_examples(loaded)
    try:
        with templates(settings), _quiet(), _programs(settings):
            found = evaluate(
                lm=lm,
                task_dict=loaded,
                limit=settings.limit,
                bootstrap_iters=_NUM_BOOTSTRAP,
                log_samples=False,
                apply_chat_template=settings.apply_chat_template,
                fewshot_as_multiturn=settings.apply_chat_template,
                confirm_run_unsafe_code=settings.allow_code_execution,
            )
    except CapgapError:
        raise
    except (*_OF_THE_TASK, TemplateError) as error:
        raise InputError(
            f"the task {asked.task} cannot be measured",
            where=f"benchmarks.tasks.{asked.name}",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:300],
            expected="a task whose settings fit its data, its examples and the model's context",
        ) from error
    with templates(settings):
        chances = {name: _chance(task, settings.limit) for name, task in loaded["tasks"].items()}
    return _rows(found, loaded, asked, chances)


def templates(settings: BenchmarkSettings) -> contextlib.AbstractContextManager[None]:
    """Return a context in which templates of tasks are rendered; those of untrusted tasks are sandboxed."""
    own = settings.include_path is not None and not settings.trust_task_code
    return sandboxed_templates() if own else contextlib.nullcontext()


def mean_of(preset: str, rows: tuple[BenchmarkRow, ...]) -> BenchmarkMean:
    """Return the mean over tasks with equal weights; their examples are independent, so their variances add up."""
    errors = [row.stderr for row in rows if row.stderr is not None]
    return BenchmarkMean(
        preset=preset,
        tasks=tuple(row.asked for row in rows),
        value=math.fsum(row.value for row in rows) / len(rows),
        stderr=math.sqrt(math.fsum(error**2 for error in errors)) / len(rows) if len(errors) == len(rows) else None,
    )


def _rows(
    found: Mapping[str, Any], loaded: Mapping[str, Any], asked: Asked, chances: Mapping[str, float | None]
) -> tuple[BenchmarkRow, ...]:
    """Return the rows of a result, with the main metric marked.

    A group that aggregates represents its tasks; tasks of a tag, or of a group that does not, represent themselves.
    """
    heads = [asked.task] if _metrics(found["results"].get(asked.task, {})) else sorted(loaded["tasks"])
    rows: list[BenchmarkRow] = []
    for name, metrics in found["results"].items():
        keys = _metrics(metrics)
        main = _main(name, keys, asked) if name in heads else None
        leaves = _leaves_of(loaded, name)
        samples = [found["n-samples"][leaf] for leaf in leaves]
        for key in keys:
            metric, _, kind = key.partition(",")
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                BenchmarkRow(
                    asked=asked.name,
                    task=name,
                    metric=metric,
                    filter=kind,
                    value=float(metrics[key]),
                    stderr=float(stderr) if isinstance(stderr, Real) and math.isfinite(stderr) else None,
                    chance=_weighted(chances, leaves, found["n-samples"]) if metric == "acc" else None,
                    higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                    num_fewshot=_same([found["n-shot"][leaf] for leaf in leaves]),
                    num_samples=sum(one["effective"] for one in samples),
                    num_all_samples=sum(one["original"] for one in samples),
                    version=str(found["versions"].get(name, "")),
                    main=key == main,
                )
            )
    return tuple(sorted(rows, key=lambda row: not row.main))


def _metrics(values: Mapping[str, Any]) -> list[str]:
    """Return the keys `metric,filter` of what lm-eval reports for one task."""
    numbers = [key for key, value in values.items() if "," in key and isinstance(value, Real)]
    return [key for key in numbers if not key.partition(",")[0].endswith("_stderr")]


def _main(name: str, keys: list[str], asked: Asked) -> str:
    """Return the key of the metric that stands for the task of this name."""
    if not keys:
        raise InputError(
            f"the task {name} reports no number",
            where=f"benchmarks.tasks.{asked.name}",
            expected="at least one metric with a numeric mean",
            fix="mend the metrics in the task's file, or leave the task out",
        )
    if asked.metric is None:
        return keys[0]
    chosen = [key for key in keys if asked.metric in (key, key.partition(",")[0])]
    if not chosen:
        raise SettingError(
            "the task has no such metric",
            where=f"benchmarks.tasks.{asked.name}.metric",
            found=asked.metric,
            expected=f"one of {' or '.join(keys)}",
        )
    return chosen[0]


def _leaves_of(loaded: Mapping[str, Any], name: str) -> list[str]:
    groups = loaded.get("groups", {})
    return [task.task_name for task in groups[name].get_all_tasks()] if name in groups else [name]


def _chance(task: Any, limit: int | None) -> float | None:
    """Return the mean score of guessing: one over the number of choices; None for tasks without multiple choice."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = [1 / len(task.doc_to_choice(doc)) for _, doc in task.doc_iterator(limit=limit)]
    return math.fsum(shares) / len(shares)


def _weighted(
    chances: Mapping[str, float | None], leaves: list[str], samples: Mapping[str, Mapping[str, int]]
) -> float | None:
    """Return the mean chance of several tasks, weighted by their questions, as lm-eval weights a group's accuracies."""
    known = [(chance, samples[leaf]["effective"]) for leaf in leaves if (chance := chances.get(leaf)) is not None]
    if len(known) < len(leaves):
        return None
    return math.fsum(chance * number for chance, number in known) / sum(number for _, number in known)


def _same(numbers: list[int]) -> int | None:
    return numbers[0] if len(set(numbers)) == 1 else None


@contextlib.contextmanager
def _programs(settings: BenchmarkSettings) -> Iterator[None]:
    """Set the variable without which Hugging Face's `evaluate` does not run a model's programs."""
    if settings.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's progress bars away from a terminal, because they fill a log with noise."""
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
        yield
