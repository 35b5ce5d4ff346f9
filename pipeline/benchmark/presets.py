"""The benchmarks of the law of capacity gap's paper (arXiv 2311.07052), as lm-eval has them.

The paper names tasks and numbers of examples (MMLU 5, C-Eval 5, DROP 3, HumanEval 0, BBH 3, GSM8K 8) and gives the mean
of the six; it does not say which metric each has. Here the metrics are accuracy for the two multiple-choice tasks, F1
for DROP, pass@1 for HumanEval, and exact match for BBH, answered without reasoning, and for GSM8K after `####`. C-Eval
is its validation split, because the answers of its test split are not public.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from capgap.schemas.errors import SettingError
from capgap.schemas.run_benchmark import BenchmarkTask


class Asked(NamedTuple):
    """One task to measure.

    Attributes:
        name: Name of the preset, or name in the run file.
        task: Name of a task, group or tag of lm-eval.
        num_fewshot: Number of solved examples before each question; None for the task's own number.
        metric: `metric` or `metric,filter`; None for the task's first metric.
    """

    name: str
    task: str
    num_fewshot: int | None
    metric: str | None


PRESETS: dict[str, Asked] = {
    "mmlu": Asked("mmlu", "mmlu", 5, "acc,none"),
    "ceval": Asked("ceval", "ceval-valid", 5, "acc,none"),
    "drop": Asked("drop", "drop", 3, "f1,none"),
    "humaneval": Asked("humaneval", "humaneval", 0, "pass@1,create_test"),
    "bbh": Asked("bbh", "bbh_fewshot", 3, "exact_match,none"),
    "gsm8k": Asked("gsm8k", "gsm8k", 8, "exact_match,strict-match"),
}

SUITES: dict[str, tuple[str, ...]] = {"paper": tuple(PRESETS)}
"""Presets that stand for several tasks, whose mean is reported too."""


def asked_tasks(tasks: Mapping[str, BenchmarkTask]) -> tuple[Asked, ...]:
    """Return every task that the run file asks for, in its order.

    Raises:
        SettingError: A task is asked for twice, or a preset of several tasks is given a task's settings.
    """
    found: dict[str, Asked] = {}
    for name, settings in tasks.items():
        if name in SUITES:
            if settings != BenchmarkTask():
                raise SettingError(
                    "a preset of several tasks has no settings of its own",
                    where=f"benchmarks.tasks.{name}",
                    expected="{}",
                    fix=f"name the tasks one by one: {', '.join(SUITES[name])}",
                )
            new = [PRESETS[one] for one in SUITES[name]]
        else:
            own = PRESETS.get(name, Asked(name, name, None, None))
            num_fewshot = own.num_fewshot if settings.num_fewshot is None else settings.num_fewshot
            new = [own._replace(num_fewshot=num_fewshot, metric=settings.metric or own.metric)]
        for one in new:
            if one.task in found:
                raise SettingError("a task is asked for twice", where=f"benchmarks.tasks.{name}", found=one.task)
            found[one.task] = one
    return tuple(found.values())


def asked_suites(tasks: Mapping[str, BenchmarkTask]) -> dict[str, tuple[str, ...]]:
    """Return the presets behind each preset of several tasks that the run file asks for."""
    return {name: SUITES[name] for name in tasks if name in SUITES}
