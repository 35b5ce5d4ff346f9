"""`benchmark.json`: what a benchmark stage measured of one model.

value    a metric of lm-eval over the examples of a task; of a group, over those of all its tasks
stderr   standard error of that mean over the choice of examples, as lm-eval has it
chance   what guessing among the choices gives in the mean, for accuracies of multiple choice
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capgap.schemas.base import Record

BENCHMARK_NAME = "benchmark.json"


class BenchmarkRow(Record):
    """One metric of one task, or of a group of tasks."""

    asked: str
    """Preset or name in the run file that it belongs to."""

    task: str
    """Name in lm-eval."""

    metric: str
    """Name in lm-eval, for example `acc`."""

    filter: str
    """Which reading of the model's answers it is of; `none` where there is one only."""

    value: float
    """As lm-eval has it: a share lies between 0 and 1."""

    stderr: float | None
    """None where lm-eval gives none."""

    chance: float | None
    """None where it is not known."""

    higher_is_better: bool | None
    """None where the task does not say."""

    num_fewshot: int | None
    """Solved examples before each question; None for a group whose tasks differ."""

    num_samples: int
    """Examples that were asked."""

    num_all_samples: int
    """Examples that the task has; more than were asked where there is a limit."""

    version: str
    """The task's version, as its authors count."""

    main: bool
    """It stands for what was asked: in the report, and in a preset's mean."""


class BenchmarkMean(Record):
    """The mean over the tasks of a preset, each counting alike."""

    preset: str
    """Name in the run file."""

    tasks: tuple[str, ...]
    """Whose main metrics it is of."""

    value: float
    """Mean of their values."""

    stderr: float | None
    """The standard error of that mean; None where a task has none."""


class BenchmarkConditions(Record):
    """How a model was measured."""

    backend: Literal["hf", "vllm"]
    """What ran it."""

    dtype: str
    """The weights' dtype while it ran."""

    context_tokens: int
    """Longest prompt with its answer."""

    versions: dict[str, str]
    """Versions of lm-eval, of what it reads data with, and of the backend."""


class BenchmarkResults(BenchmarkConditions):
    """Everything in `benchmark.json`; the conditions are those of the process that measured last."""

    earlier: dict[str, BenchmarkConditions] = Field(default_factory=dict)
    """Where a killed process measured some tasks under other conditions: those, by the task's name in the run file."""

    model: str
    """Instance that made the model: `teacher`, or `train/<arm>/seed-<seed>`."""

    limit: int | None
    """Examples of each task at most; None for all of them."""

    rows: tuple[BenchmarkRow, ...]
    """In the order of the run file, the main one of each task first."""

    means: tuple[BenchmarkMean, ...]
    """The mean of every preset that has several tasks."""

    @property
    def main(self) -> tuple[BenchmarkRow, ...]:
        """The rows that stand for what was asked."""
        return tuple(row for row in self.rows if row.main)
