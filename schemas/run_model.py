"""Settings of the stages that make models: teacher and student."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_prune import PruneSettings
from capgap.schemas.run_quantize import QuantizeSettings


class ModelShape(Record):
    """A Llama-shaped model with fresh weights; its vocabulary comes from the corpus."""

    hidden_size: int = Field(192, ge=8)
    """Width."""

    num_layers: int = Field(4, ge=1)
    """Depth."""

    num_heads: int = Field(6, ge=1)
    """Query heads; must divide `hidden_size`."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Key and value heads; as many as query heads where it is left out."""

    intermediate_size: int = Field(512, ge=8)
    """Width of the feed-forward layers."""

    tie_word_embeddings: bool = True
    """One matrix for embedding and head."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: found {self.hidden_size}, expected a multiple of 2 x num_heads = {2 * self.num_heads}"
            )
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(
                f"num_key_value_heads: found {self.num_key_value_heads}, expected a divisor of {self.num_heads}"
            )
        return self


class AdaptSettings(OptimizationSettings):
    """How a given teacher goes on to be trained, with cross-entropy alone, on the corpus's text for teachers."""

    learning_rate: float = Field(3e-5, gt=0)
    """Peak learning rate."""

    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Rows of embedding and head are filled up to a multiple of this; no token has a filler's id. No more rows than the
    vocabulary needs, or the teacher has, where it is left out."""


class TeacherSettings(Record):
    """A given teacher (`path`), perhaps adapted, one that is served elsewhere (`served`), or the recipe of a small one
    (`model` and `training`)."""

    path: str | None = None
    """A Hugging Face folder or id."""

    served: str | None = Field(None, min_length=1)
    """The name by which the server at `cache.server` knows the teacher, for `cache.engine: server`. Its weights are not
    needed here: `path` may name its configuration and tokenizer, so that they are checked, or be left out."""

    model: ModelShape | None = None
    """Shape of a teacher to train on the teacher's part of the corpus."""

    training: OptimizationSettings | None = None
    """How that teacher is trained."""

    adapt: AdaptSettings | None = None
    """Trains the teacher at `path` further on the teacher's part of the corpus before it is asked: to a vocabulary that
    `corpus.extend_vocabulary` has extended, or, with few tokens, to the corpus's kind of text ("teacher correction",
    arXiv 2408.11796). The result is a folder of this run; the model at `path` stays as it is."""

    home_loss: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """Mean loss of the teacher at `path` on text like that it was trained on, nats/token, where you know it: `capgap
    plan` then says whether its loss on this corpus lies far above."""

    seed: int = Field(0, ge=0)
    """Seed of its weights and data order."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. Whoever wrote it may do anything that you may."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.model is not None:
            raise ValueError("teacher: found both of path and model, expected one of them")
        _code_of_a_path("teacher.model", self.path, self.trust_remote_code)
        if self.adapt is not None and self.path is None:
            raise ValueError("teacher.adapt: found with teacher.model, expected it with teacher.path")
        if self.path is not None and self.training is not None:
            raise ValueError("teacher.training: found beside teacher.path, expected only with teacher.model")
        if self.served is not None:
            for name in ("model", "training", "adapt"):
                if getattr(self, name) is not None:
                    raise ValueError(f"teacher.{name}: found with teacher.served, expected a teacher that is whole")
        return self

    @property
    def recipe(self) -> OptimizationSettings:
        """How a teacher with fresh weights is trained."""
        return self.training if self.training is not None else OptimizationSettings()

    @property
    def optimization(self) -> OptimizationSettings | None:
        """Settings of the training that the stage is; None where a given teacher is taken as it is."""
        return self.adapt if self.is_given else self.recipe

    @property
    def is_given(self) -> bool:
        """Whether somebody else made the teacher."""
        return self.path is not None or self.served is not None

    def meant(self) -> dict[str, Any]:
        """The recipe, where a teacher with fresh weights has none of its own."""
        return {} if self.is_given else {"training": self.recipe.decisive()}


class StudentSettings(Record):
    """Where the student's first weights come from."""

    path: str | None = None
    """A Hugging Face folder or id to start from."""

    model: ModelShape | None = None
    """Shape of a student with fresh weights."""

    prune: PruneSettings | None = None
    """The shape that the teacher is pruned to."""

    quantize: QuantizeSettings | None = None
    """The format of few bits that the student is made, trained and saved in, beside `path`, `model` or `prune`; none
    where it is left out."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. Whoever wrote it may do anything that you may."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [name for name in ("path", "model", "prune") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"student: found {' and '.join(named)}, expected one of path, model and prune")
        origin = "student.model" if self.prune is None else "student.prune"
        _code_of_a_path(origin, self.path, self.trust_remote_code)
        return self


def _code_of_a_path(origin: str, path: str | None, trusted: bool) -> None:
    if trusted and path is None:
        stage = origin.partition(".")[0]
        raise ValueError(f"{stage}.trust_remote_code: found true with {origin}, expected it with {stage}.path")
