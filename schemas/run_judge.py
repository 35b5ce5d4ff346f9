"""Settings of the judge: which questions models answer, how, and who says how good the answers are.

questions --> stage answers, one folder a model --> stage judge --> judge.json
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from capgap.schemas.base import OPERATIONAL, Record
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
"""The temperatures at which MT-Bench has its eight categories answered (Zheng et al., 2023, arXiv:2306.05685)."""


Probability = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]


class AnswerSettings(Record):
    """How every model of the run answers the questions."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """What runs the models. `transformers` is slow: one question at a time."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of weights and activations; `auto` takes them as they were saved."""

    max_tokens: int = Field(1024, ge=1)
    """Longest answer to one turn."""

    temperatures: dict[str, Temperature] = Field(default_factory=lambda: dict(MT_BENCH_TEMPERATURES))
    """Sampling temperatures by category; 0 takes the top-1 token each time."""

    temperature: Temperature = 0.7
    """Sampling temperature of categories that `temperatures` does not name."""

    top_p: Probability = 1.0
    """Answers are sampled from the most probable tokens that together hold this probability."""

    seed: int = Field(0, ge=0)
    """Seed of the answers. Each is sampled with a seed of its own, made of this one, the question and the turn."""

    gpu_memory_fraction: float = Field(0.8, gt=0, le=0.95, json_schema_extra=OPERATIONAL)
    """Share of a GPU's memory that vLLM may claim."""

    def temperature_of(self, category: str) -> float:
        """The temperature at which a question of this category is answered."""
        return self.temperatures.get(category, self.temperature)


class JudgeSettings(EndpointSettings):
    """Answers to a set of two-turn questions, and a language model that judges them."""

    model: str = Field(min_length=1)
    """The judge, as its endpoint calls it."""

    mode: Literal["single", "pairwise", "both"] = "single"
    """`single`: each answer is given a number from 1 to 10. `pairwise`: each two models of a seed, and each student and
    the teacher, are held against each other, in both orders."""

    questions: str | None = None
    """JSONL in MT-Bench's form: question_id, category, turns, and for some reference. A dozen of capgap's own where it
    is left out: enough to try the stage, too few to tell models apart."""

    teacher: bool = True
    """Whether the teacher answers too."""

    answers: AnswerSettings = Field(default_factory=AnswerSettings)
    """How the models answer."""

    temperature: Temperature | None = 0.0
    """Temperature of the judge; null sends none, for endpoints that take none."""

    max_tokens: int = Field(2048, ge=1)
    """Longest reply of the judge."""

    num_asks: int = Field(3, ge=1)
    """How often the judge is asked in all, where no verdict can be read in its reply."""

    num_bootstrap: int = Field(1000, ge=100)
    """Resamples of the questions behind each interval."""

    @property
    def modes(self) -> tuple[Literal["single", "pairwise"], ...]:
        """The kinds of verdict."""
        return ("single", "pairwise") if self.mode == "both" else (self.mode,)
