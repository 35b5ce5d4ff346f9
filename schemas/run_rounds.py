"""Settings of the rounds: models write, the teacher scores what they wrote, students learn from that, and again.

generate --> cache --> train --> generate --> cache --> train ...     one model on the device at a time
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.run_judge import Probability

Writer = Literal["teacher", "student"]
"""Who writes the text of a round."""


class RoundsSettings(Record):
    """Text that models write in answer to prompts, scored by the teacher and learnt from in rounds."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Files of prompts, JSONL: `{"messages": [...]}`, which the writer's chat template turns into a prompt, or
    `{"prompt": "..."}`, a text that is continued; with `"reference"`, a text or several, where the right answer is
    known. Messages may hold tool calls, and `tools` stand beside them, as in a corpus. Prompts are read and never
    learnt."""

    num: int = Field(3, ge=1)
    """Rounds. Each goes on from the weights of the one before."""

    first_writer: Writer = "teacher"
    """Who writes the text of round 0: the `teacher`, which is sequence-level distillation with the teacher's
    distributions kept, or the `student` with its first weights. Students write that of all later rounds."""

    off_policy_arms: tuple[str, ...] = ()
    """Arms that learn from the teacher's text in every round, at the same prompts and as many rounds: baselines."""

    replay: float = Field(0.0, ge=0, lt=1)
    """Share of the steps of a later round that learn from the caches of the rounds before it, from all alike."""

    prompts_per_round: int | None = Field(None, ge=1)
    """Prompts of a round, in the order of the files, each round going on where the one before stopped and from the end
    to the beginning. All of them where it is left out, or where there are no more; none twice in a round."""

    num_samples: int = Field(1, ge=1)
    """Answers to each prompt."""

    max_new_tokens: int = Field(512, ge=1)
    """Longest answer. One that has not ended by then is cut off, kept and counted. Prompt and answer fit into
    `corpus.seq_len` tokens; a prompt that leaves no room for an answer is left out and counted."""

    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature of the writers."""

    top_p: Probability = 1.0
    """Answers are sampled from the most probable tokens that together hold this probability."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer too, which ends behind them. An answer ends with the writer's end of text or of turn."""

    seed: int = Field(0, ge=0)
    """Seed of the answers. Each is sampled with a seed of its own, made of this one, the run's seed, the round, the
    prompt and the number of the sample."""

    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that no student learns from, decided by the digest of the prompt."""

    num_heldout_prompts: int = Field(256, ge=1)
    """The most of them that are answered, once each in every round: what students are measured on."""

    answer_pattern: str | None = None
    """A regular expression, for prompts with a reference: what its last match's first group holds is compared with the
    reference, without spaces around it. The whole answer where it is left out."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the writers. `transformers` is the slow reference: one answer at a time."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of weights and activations; `auto` takes them as they were saved."""

    unit_prompts: int = Field(256, ge=1)
    """Prompts of a unit: all their answers are written side by side and become one shard."""

    replicas: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Writers at work at the same time, each in a process and on devices of its own; they are started by Ray."""

    tensor_parallel: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Devices that vLLM spreads the teacher over while it writes. A student writes on one."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of a GPU's memory that vLLM may claim."""

    @field_validator("prompts", "stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answer_pattern is not None:
            try:
                groups = re.compile(self.answer_pattern).groups
            except re.error as error:
                raise ValueError(f"answer_pattern: found {self.answer_pattern!r}: {error}") from None
            if groups != 1:
                raise ValueError(f"answer_pattern: found {groups} groups, expected one, around what is compared")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine != "vllm" and self.tensor_parallel > 1:
            raise ValueError(
                f"tensor_parallel: found {self.tensor_parallel} with engine {self.engine}, expected engine vllm"
            )
        return self

    def text_settings(self) -> dict[str, Any]:
        """Those that decide the text of one round."""
        of_training = {"num", "first_writer", "off_policy_arms", "replay"}
        return {name: value for name, value in self.decisive().items() if name not in of_training}
