"""Settings of the stages answers and judge: models answer questions, and a language model judges the answers.

questions --> stage answers, one folder a model --> stage judge --> judge.json
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_endpoint import EndpointSettings

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""The sampling temperatures of MT-Bench's eight categories of questions (Zheng et al., 2023, arXiv 2306.05685)."""


Probability = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]


class AnswerSettings(Record):
    """How every model of the run answers the questions."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the models. `transformers` is slow: it answers one question at a time."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of weights and activations; `auto` is the dtype of the checkpoint."""

    max_tokens: int = Field(1024, ge=1)
    """Longest answer to one turn, in tokens."""

    temperatures: dict[str, Temperature] = Field(default_factory=lambda: dict(MT_BENCH_TEMPERATURES))
    """Sampling temperatures by category of question; 0 always takes the most probable token."""

    temperature: Temperature = 0.7
    """Sampling temperature of categories that `temperatures` does not name."""

    top_p: Probability = 1.0
    """Sample answers only from the most probable tokens that together hold this probability (nucleus sampling)."""

    seed: int = Field(0, ge=0)
    """Seed of the answers. Each is sampled with its own seed, derived from this one, the question and the turn."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of a GPU's memory that vLLM may take."""

    def temperature_of(self, category: str) -> float:
        """Return the sampling temperature for questions of this category."""
        return self.temperatures.get(category, self.temperature)


class JudgeSettings(EndpointSettings):
    """Answers to a set of two-turn questions, and a language model that judges them."""

    model: str = Field(min_length=1)
    """Name of the judge at its endpoint."""

    mode: Literal["single", "pairwise", "both"] = "single"
    """`single`: the judge rates each answer from 1 to 10. `pairwise`: it compares the answers of every two models of
    one seed, and of each student and the teacher, in both orders. `both` does both."""

    questions: Annotated[str | None, PATH] = None
    """JSONL file of questions in MT-Bench's form. It holds question_id, category, turns and, for some, reference. Left
    out, capgap's own dozen of questions: enough to try the stage, but too few to tell models apart."""

    teacher: bool = True
    """Whether the teacher answers too."""

    answers: AnswerSettings = Field(default_factory=AnswerSettings)
    """How the models answer."""

    temperature: Temperature | None = 0.0
    """Sampling temperature of the judge. null sends none, for endpoints that accept none."""

    max_tokens: int = Field(2048, ge=1)
    """Longest reply of the judge, in tokens."""

    num_asks: int = Field(3, ge=1)
    """Largest number of times that the judge is asked until its reply holds a verdict."""

    num_bootstrap: int = Field(1000, ge=100)
    """Bootstrap resamples of the questions from which each interval is computed."""

    @property
    def modes(self) -> tuple[Literal["single", "pairwise"], ...]:
        """The kinds of verdict that are requested: `single`, `pairwise` or both."""
        return ("single", "pairwise") if self.mode == "both" else (self.mode,)
