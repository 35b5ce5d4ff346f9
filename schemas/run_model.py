"""Settings of the stages that make models: teacher and student."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from capgap.schemas.base import OPERATIONAL, Record
from capgap.schemas.home import PATH
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_prune import PruneSettings
from capgap.schemas.run_quantize import QuantizeSettings


class ModelShape(Record):
    """A model of the Llama architecture with fresh, random weights; its vocabulary comes from the corpus."""

    hidden_size: int = Field(192, ge=8)
    """Width of the hidden states. It must be a multiple of 2 x `num_heads`."""

    num_layers: int = Field(4, ge=1)
    """Number of decoder layers."""

    num_heads: int = Field(6, ge=1)
    """Query heads of a layer. 2 x `num_heads` must divide `hidden_size`."""

    num_key_value_heads: int | None = Field(None, ge=1)
    """Key and value heads of a layer; must divide `num_heads`. Left out, as many as query heads."""

    intermediate_size: int = Field(512, ge=8)
    """Width of the feed-forward layers."""

    tie_word_embeddings: bool = True
    """Use one matrix as both embedding and head, which saves parameters in small models."""

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
    """How a given teacher is trained further, with cross-entropy alone, on the corpus's split for the teacher."""

    learning_rate: float = Field(3e-5, gt=0)
    """Peak learning rate."""

    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Pad the rows of embedding and head to a multiple of this number, for example 64 for speed on a GPU. Padding rows
    belong to no token. Left out, there are as many rows as the vocabulary needs or the teacher already has."""


class TeacherSettings(Record):
    """A given teacher (`path`, perhaps with `adapt`), a teacher that a server runs (`served`), or a small teacher to
    train here (`model` and `training`)."""

    path: Annotated[str | None, PATH] = None
    """Folder or Hugging Face id of the teacher."""

    served: str | None = Field(None, min_length=1)
    """Name of the teacher at `cache.server`, for `cache.engine: server`. The weights are not needed on this
    machine. `path` may name a folder with its configuration and tokenizer, which are then checked, or be left out."""

    model: ModelShape | None = None
    """Shape of a new teacher, trained on the corpus's split for the teacher."""

    training: OptimizationSettings | None = None
    """How the new teacher of `model` is trained."""

    adapt: AdaptSettings | None = None
    """Train the teacher at `path` further before it scores. On the corpus's split for the teacher it learns a
    vocabulary extended by `corpus.extend_vocabulary`, or, with few tokens, adjusts to the corpus's kind of text
    ("teacher correction", arXiv 2408.11796). The result is a folder of this run; the model at `path` is not changed."""

    home_loss: float | None = Field(None, gt=0, json_schema_extra=OPERATIONAL)
    """Mean loss, in nats/token, of the teacher at `path` on text like its training text, if you know it. `capgap plan`
    then warns when its loss on this corpus is far above."""

    seed: int = Field(0, ge=0)
    """Seed of the new teacher's weights and of its data order."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. That code can do anything that you can, so set this only
    if you trust its author."""

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
                    raise ValueError(
                        f"teacher.{name}: found with teacher.served, expected none; a server runs a finished teacher"
                    )
        return self

    @property
    def recipe(self) -> OptimizationSettings:
        """How a new teacher is trained: `training`, with its default."""
        return self.training if self.training is not None else OptimizationSettings()

    @property
    def optimization(self) -> OptimizationSettings | None:
        """Settings of the training that the teacher stage runs; None if a given teacher is used unchanged."""
        return self.adapt if self.is_given else self.recipe

    @property
    def is_given(self) -> bool:
        """Whether the teacher exists before the run, as a folder, an id or a server's model."""
        return self.path is not None or self.served is not None

    def meant(self) -> dict[str, Any]:
        """Return the settings by which a new teacher is trained, so that leaving out `training` means its default."""
        return {} if self.is_given else {"training": self.recipe.decisive()}


class StudentSettings(Record):
    """Where the student's initial weights come from: one of `path`, `model` and `prune`."""

    path: Annotated[str | None, PATH] = None
    """Folder or Hugging Face id of a model to start from."""

    model: ModelShape | None = None
    """Shape of a student with fresh, random weights."""

    prune: PruneSettings | None = None
    """Make the student from the teacher, pruned to the shape given here."""

    quantize: QuantizeSettings | None = None
    """Low-bit format in which the student is trained and saved, beside `path`, `model` or `prune`. Left out, the
    student is not quantised."""

    trust_remote_code: bool = False
    """Run the Python code that comes with the model at `path`. That code can do anything that you can, so set this only
    if you trust its author."""

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
