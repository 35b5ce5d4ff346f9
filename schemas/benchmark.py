"""`benchmark.json`: the results of one model in a benchmark stage.

value    a metric of lm-eval over the examples of a task; for a group, over the examples of all its tasks
stderr   standard error of that mean over the choice of examples, as lm-eval computes it
chance   expected value of guessing among the choices, for accuracies of multiple choice
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capgap.schemas.base import Record

BENCHMARK_NAME = "benchmark.json"


class BenchmarkRow(Record):
    """One metric of one task, or of a group of tasks."""

    asked: str
    """Name in `benchmarks.tasks`, a preset or a task, that the row belongs to."""

    task: str
    """Name of the task in lm-eval."""

    metric: str
    """Name of the metric in lm-eval, for example `acc`."""

    filter: str
    """Name of lm-eval's filter, which extracts the answer from the model's text; `none` if there is only one."""

    value: float
    """Value of the metric as lm-eval gives it: a share is between 0 and 1."""

    stderr: float | None
    """Standard error of the value; None if lm-eval gives none."""

    chance: float | None
    """Expected value of guessing; None if it is not known."""

    higher_is_better: bool | None
    """Whether a higher value is better; None if the task does not say."""

    num_fewshot: int | None
    """Number of solved examples before each question; None for a group whose tasks differ."""

    num_samples: int
    """Number of examples that were asked."""

    num_all_samples: int
    """Number of examples that the task has, which `benchmarks.limit` may cut."""

    version: str
    """Version of the task, as given by its authors."""

    main: bool
    """Whether this is the main metric of the task, which the report shows and a preset's mean uses."""


class BenchmarkMean(Record):
    """The mean over the tasks of a preset, with equal weights."""

    preset: str
    """Name of the preset in the run file."""

    tasks: tuple[str, ...]
    """Tasks whose main metrics are averaged."""

    value: float
    """Mean of the values."""

    stderr: float | None
    """Standard error of that mean; None if a task has none."""


class BenchmarkConditions(Record):
    """The conditions under which a model was measured."""

    backend: Literal["hf", "vllm"]
    """Library that ran the model."""

    dtype: str
    """Dtype of the weights while the model ran."""

    context_tokens: int
    """Largest number of tokens of a prompt and its answer."""

    versions: dict[str, str]
    """Versions of lm-eval, of the libraries with which it reads data, and of the backend."""


class BenchmarkResults(BenchmarkConditions):
    """The content of `benchmark.json`; the conditions are those of the process that measured last."""

    earlier: dict[str, BenchmarkConditions] = Field(default_factory=dict)
    """The conditions of tasks that a killed process measured under other ones, by the task's name in the run file."""

    model: str
    """Instance that made the model: `teacher`, or `train/<arm>/seed-<seed>`."""

    limit: int | None
    """Largest number of examples of each task; None for all."""

    rows: tuple[BenchmarkRow, ...]
    """The rows in the order of the run file, the main metric of each task first."""

    means: tuple[BenchmarkMean, ...]
    """The mean of every preset that has several tasks."""

    @property
    def main(self) -> tuple[BenchmarkRow, ...]:
        """The rows of main metrics."""
        return tuple(row for row in self.rows if row.main)
