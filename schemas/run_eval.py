"""Settings of the eval stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record


class SpeculativeSettings(Record):
    """Speculative decoding in vLLM: every student drafts tokens for the teacher, and accepted tokens are counted."""

    num_speculative_tokens: int = Field(3, ge=1, le=16)
    """Tokens that the student drafts before each pass of the teacher."""

    num_prompts: int = Field(32, ge=1)
    """Number of held-out sequences whose beginnings are prompts. If there are fewer sequences, all are used."""

    num_prompt_tokens: int = Field(32, ge=1)
    """Tokens of a prompt, but at most `corpus.seq_len` - `num_new_tokens`."""

    num_new_tokens: int = Field(64, ge=2)
    """Tokens generated after each prompt, sampled at temperature 1."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of the GPU's memory that vLLM may take for teacher, student and their KV caches."""


class EvalSettings(Record):
    """How models are measured on held-out text."""

    num_sequences: int = Field(512, ge=2)
    """Held-out sequences on which every model is measured. If there are fewer, all are used."""

    num_full_sequences: int = Field(64, ge=2)
    """Sequences compared with the teacher's full distribution. They are some of `num_sequences`, and give KL, agreement
    and acceptance, which take more time than the loss."""

    num_bootstrap: int = Field(1000, ge=100)
    """Bootstrap resamples of the held-out sequences from which each interval is computed."""

    batch_sequences: int = Field(16, ge=1, json_schema_extra=OPERATIONAL)
    """Sequences in one forward pass. Lower it if the device runs out of memory."""

    teacher: Literal["auto", "live", "cache"] = "auto"
    """What students are compared with, beside the text. `live`: the teacher itself, which is on the device before the
    first student, and the cache's held-out sequences. `cache`: those sequences alone, for a teacher that this machine
    lacks or cannot hold; neither its stage nor its model is needed. `auto`: `cache` if a finished cache is reused
    without a teacher, or, with a warning, if the model is not found or is larger than the device's free memory; else
    `live`."""

    num_text_samples: int = Field(3, ge=0, le=64)
    """Number of held-out texts whose beginning every model continues, always with its most probable token. The report
    shows them side by side. 0 means none."""

    text_sample_tokens: int = Field(48, ge=1, le=1024)
    """Largest number of tokens that continue such a beginning; a sequence may end earlier."""

    speculative: SpeculativeSettings | None = None
    """Also measure how often the teacher accepts a student's draft tokens. vLLM then holds teacher and student on one
    device together. Left out, it is not measured."""

    @model_validator(mode="after")
    def _check_speculative(self) -> Self:
        if self.speculative is not None and self.teacher == "cache":
            raise ValueError("eval.speculative: found with eval.teacher cache, expected live; it needs the teacher")
        return self
