"""How large the models of a run are, without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass

from capgap.pipeline.models import load_config, model_facts
from capgap.pipeline.tokenizers import load_tokenizer
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.plan import Figure
from capgap.schemas.run_model import ModelShape

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        total: all parameters, tied ones once.
        outside_embedding: without embedding and head.
        where: what it was counted from, or why it is not known.
    """

    total: float | None
    outside_embedding: float | None
    where: str

    @property
    def figure(self) -> Figure:
        """Of all parameters."""
        return Figure(value=self.total, source=self.where)

    @property
    def saved_bytes(self) -> float | None:
        """As safetensors of float32, which is what is trained and saved here."""
        return None if self.total is None else self.total * _FLOAT32_BYTES


def model_size(
    manifest: Manifest | None, path: str | None, shape: ModelShape | None, vocab_size: float | None
) -> ModelSize:
    """Of a finished stage, a given model, or a shape; the first of these that is there."""
    if manifest is not None and "num_parameters" in manifest.facts:
        facts = ModelFacts.model_validate(manifest.facts)
        return ModelSize(facts.num_parameters, facts.num_non_embedding_parameters, "its manifest")
    if path is not None:
        try:
            facts = model_facts(load_config(path), load_tokenizer(path), path)
        except CapgapError as error:
            return ModelSize(None, None, f"cannot be counted: {error}")
        return ModelSize(facts.num_parameters, facts.num_non_embedding_parameters, f"the configuration of {path}")
    if shape is not None:
        outside = shape_parameters(shape)
        if vocab_size is None:
            return ModelSize(None, outside, "its embedding is as large as a tokenizer that cannot be read")
        embedding = vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
        return ModelSize(outside + embedding, outside, "its shape")
    return ModelSize(None, None, "not known before it is made")


def shape_parameters(shape: ModelShape) -> int:
    """Parameters of a Llama of that shape, without embedding and head."""
    width = shape.hidden_size
    key_value = width // shape.num_heads * (shape.num_key_value_heads or shape.num_heads)
    attention = 2 * width * width + 2 * width * key_value
    feed_forward = 3 * width * shape.intermediate_size
    norms = 2 * width
    return shape.num_layers * (attention + feed_forward + norms) + width
