"""Settings of rounds: in each, a model writes text, the teacher scores it, and the students learn from the result.

generate --> cache --> train --> generate --> cache --> train ...     one model on the device at a time
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_judge import Probability

Writer = Literal["teacher", "student"]
"""The model that writes the text of a round."""


class RoundsSettings(Record):
    """Training in rounds on text that models write in answer to prompts, scored by the teacher."""

    prompts: Annotated[tuple[str, ...], PATH] = Field(min_length=1)
    """JSONL files of prompts. A line is `{"messages": [...]}`, which the writer's chat template turns into a prompt, or
    `{"prompt": "..."}`, a text that is continued. `"reference"` beside it holds one right answer or several, if they
    are known. Messages may hold tool calls, with `tools` beside them, as in a corpus. Prompts are read and never
    learnt."""

    num: int = Field(3, ge=1)
    """Number of rounds. Each trains on from the weights of the round before."""

    first_writer: Writer = "teacher"
    """Model that writes the text of round 0. `teacher`: sequence-level distillation with the teacher's distributions.
    `student`: the student with its initial weights. In all later rounds the students write."""

    off_policy_arms: tuple[str, ...] = ()
    """Arms that learn from the teacher's text in every round, with the same prompts and rounds, as baselines."""

    replay: float = Field(0.0, ge=0, lt=1)
    """Share of a later round's steps that learn from the caches of all earlier rounds, with equal weights."""

    prompts_per_round: int | None = Field(None, ge=1)
    """Prompts of each round, in the order of the files. Each round continues where the round before stopped, and starts
    over after the last prompt; within a round no prompt is used twice. Left out, every round uses all prompts."""

    num_samples: int = Field(1, ge=1)
    """Number of answers to each prompt."""

    max_new_tokens: int = Field(512, ge=1)
    """Longest answer, in tokens. An answer that has not ended by then is cut off, kept and counted. Prompt and answer
    must fit into `corpus.seq_len` tokens; a prompt that leaves no room for an answer is left out and counted."""

    temperature: float = Field(1.0, gt=0, le=2)
    """Sampling temperature of the writers. Lower values give more probable and less varied answers."""

    top_p: Probability = 1.0
    """Sample answers only from the most probable tokens that together hold this probability (nucleus sampling)."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, and are its last part, in addition to the writer's own end of text or turn."""

    seed: int = Field(0, ge=0)
    """Seed of the answers. Each answer is sampled with its own seed, derived from this one, the run's seed, the round,
    the prompt and the number of the sample."""

    heldout_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that no student learns from, chosen by a digest of the prompt."""

    num_heldout_prompts: int = Field(256, ge=1)
    """Largest number of held-out prompts. Each is answered once in every round, to measure the students."""

    answer_pattern: str | None = None
    """For prompts with a reference: a regular expression with one group. What the group holds in its last match,
    without surrounding spaces, is compared with the reference. Left out, the whole answer is compared."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the writers. `transformers` is a slow reference that writes one answer at a time."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights and activations; `auto` is the dtype of the checkpoint."""

    unit_prompts: int = Field(256, ge=1)
    """Prompts in one unit of work. Their answers are written as one batch and become one shard."""

    replicas: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Writers that work at the same time, each in its own process and on its own devices, started by Ray."""

    tensor_parallel: int = Field(1, ge=1, json_schema_extra=OPERATIONAL)
    """Number of devices over which vLLM spreads the teacher while it writes. A student always writes on one."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of a GPU's memory that vLLM may take."""

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
        """Return the settings that decide the text of one round."""
        of_training = {"num", "first_writer", "off_policy_arms", "replay"}
        return {name: value for name, value in self.decisive().items() if name not in of_training}
