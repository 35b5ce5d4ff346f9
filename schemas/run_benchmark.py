"""Settings of the benchmark stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH


class BenchmarkTask(Record):
    """How one task is measured. A setting that is left out has the value of the preset or of the task itself."""

    num_fewshot: int | None = Field(None, ge=0)
    """Number of solved examples before each question."""

    metric: str | None = None
    """Main metric of the task, by its name in lm-eval, for example `acc_norm`. If the task has several filters, a comma
    and the filter's name follow, as in `exact_match,flexible-extract`. The other metrics are kept too."""


class BenchmarkSettings(Record):
    """The tasks of lm-eval on which the trained students and the teacher are measured."""

    tasks: dict[str, BenchmarkTask] = Field(default_factory=dict)
    """Tasks by name, each with its settings or `{}`. A name is a preset (`paper`, or one of its six: `mmlu`, `ceval`,
    `drop`, `humaneval`, `bbh`, `gsm8k`), or a task, group or tag of lm-eval."""

    # operational, because it decides which benchmark stages the run has, but not the result of any of them
    teacher: bool = Field(True, json_schema_extra=OPERATIONAL)
    """Measure the teacher too."""

    backend: Literal["auto", "hf", "vllm"] = "auto"
    """What runs the model. `auto`: vLLM on a GPU if it is installed, else transformers (`hf`)."""

    limit: int | None = Field(None, ge=1)
    """Measure only this many examples of each task, for a trial. The report marks the result as limited."""

    context_tokens: int | None = Field(None, ge=2)
    """Largest number of tokens of a prompt and its answer; longer prompts are cut from the left. Left out, the model's
    number of positions."""

    apply_chat_template: bool = False
    """Ask through the model's chat template, with the solved examples as turns of a conversation. Use it for chat
    models."""

    include_path: Annotated[str | None, PATH] = None
    """Folder of your own tasks as YAML files. Paths of data files are relative to the folder of their task."""

    trust_task_code: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Run the Python code of tasks in `include_path`. That code can do anything that you can, so set this only if you
    trust its author."""

    allow_code_execution: bool = Field(False, json_schema_extra=OPERATIONAL)
    """Run the programs that a model writes, which HumanEval and similar tasks need, on this machine and without a
    sandbox."""

    batch_sequences: int = Field(8, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass of transformers. vLLM chooses its own batches."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.tasks:
            raise ValueError("benchmarks.tasks: found none, expected at least one, for example {paper: {}}")
        if self.trust_task_code and self.include_path is None:
            raise ValueError("benchmarks.trust_task_code: found true, expected it with benchmarks.include_path")
        return self
