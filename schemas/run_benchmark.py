"""Settings of the benchmark stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record


class BenchmarkTask(Record):
    """How one task is measured; what is left out is the preset's or the task's own."""

    num_fewshot: int | None = None
    """Solved examples before each question."""

    metric: str | None = None
    """The metric that stands for the task, by its name in lm-eval, for example `acc_norm`; with a comma and the name of
    a filter where the task has several, as in `exact_match,flexible-extract`. All others are kept beside it."""


class BenchmarkSettings(Record):
    """Which tasks of lm-eval the trained students, and the teacher, are measured on."""

    tasks: dict[str, BenchmarkTask] = Field(default_factory=dict)
    """Presets (`paper`, or one of its six: `mmlu`, `ceval`, `drop`, `humaneval`, `bbh`, `gsm8k`), and tasks, groups and
    tags of lm-eval by their names, each with its settings or `{}`."""

    # decides which stages there are, and nothing of what one makes
    teacher: bool = Field(True, json_schema_extra=OPERATIONAL)
    """Measure the teacher too."""

    backend: Literal["auto", "hf", "vllm"] = "auto"
    """What runs the model. `auto`: vLLM on a GPU where it is installed, else transformers (`hf`)."""

    limit: int | None = Field(None, ge=1)
    """Only this many examples of each task: a trial, which the report calls limited."""

    context_tokens: int | None = Field(None, ge=2)
    """Longest prompt with its answer, cut from the left; as many as the model has positions where it is left out."""

    apply_chat_template: bool = False
    """Ask through the model's chat template, with the solved examples as turns of a conversation."""

    include_path: str | None = None
    """Folder of tasks of your own, as YAML; data files are found from the folder of the task that names them."""

    trust_task_code: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Run the Python code that tasks of `include_path` bring. Whoever wrote it may do anything that you may."""

    allow_code_execution: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Run the programs that a model writes, which HumanEval and the like ask for, on this machine and unguarded."""

    batch_sequences: int = Field(8, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass of transformers; vLLM makes its own batches."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks:
            raise ValueError("benchmarks.tasks: found none, expected at least one, for example {paper: {}}")
        for name, task in self.tasks.items():
            if task.num_fewshot is not None and task.num_fewshot < 0:
                raise ValueError(f"benchmarks.tasks.{name}.num_fewshot: found {task.num_fewshot}, expected 0 or more")
        if self.trust_task_code and self.include_path is None:
            raise ValueError("benchmarks.trust_task_code: found true, expected it with benchmarks.include_path")
        return self
