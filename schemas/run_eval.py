"""Settings of the eval stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record


class SpeculativeSettings(Record):
    """Speculative decoding in vLLM: every student drafts for the teacher, and what the teacher accepts is counted."""

    num_speculative_tokens: int = Field(3, ge=1, le=16)
    """Tokens that the student drafts before the teacher looks at them."""

    num_prompts: int = Field(32, ge=1)
    """Held-out sequences whose beginnings are continued (all of them, if there are fewer)."""

    num_prompt_tokens: int = Field(32, ge=1)
    """Tokens of such a beginning; `corpus.seq_len` less `num_new_tokens`, if that is fewer."""

    num_new_tokens: int = Field(64, ge=2)
    """Tokens that continue each of them, sampled at temperature 1."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of the GPU's memory that vLLM may claim for teacher, student and what it keeps of the sequences."""


class EvalSettings(Record):
    """How models are measured on held-out text."""

    num_sequences: int = Field(512, ge=2)
    """Held-out sequences that every model is scored on (all of them, if there are fewer)."""

    num_full_sequences: int = Field(64, ge=2)
    """How many of these are compared with the teacher's full distribution (KL, agreement, acceptance)."""

    num_bootstrap: int = Field(1000, ge=100)
    """Resamples of the held-out sequences behind each interval."""

    batch_sequences: int = Field(16, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass."""

    teacher: Literal["auto", "live", "cache"] = "auto"
    """What students are held against beside the text. `live`: the teacher itself, on the device before the first of
    them, and the cache's held-out sequences. `cache`: those alone, for a teacher that this machine lacks or cannot
    hold; neither its stage nor its model is needed. `auto`: `live`, or `cache` where a finished cache stands for the
    teacher, and with a warning where the model is not to be found or its weights exceed the device's free memory."""

    num_text_samples: int = Field(3, ge=0, le=64)
    """Beginnings of held-out text that every model continues, always with its top-1 token, for the report to show
    side by side; 0 for none."""

    text_sample_tokens: int = Field(48, ge=1, le=1024)
    """Tokens that continue each of them at most; fewer where a sequence ends before."""

    speculative: SpeculativeSettings | None = None
    """Also measure how often the teacher accepts each student's drafts in vLLM; not measured where it is left out. It
    puts teacher and student on one device together."""

    @model_validator(mode="after")
    def _check_speculative(self) -> Self:
        if self.speculative is not None and self.teacher == "cache":
            raise ValueError("eval.speculative: found with eval.teacher cache, expected live; it needs the teacher")
        return self
