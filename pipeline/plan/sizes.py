"""Compute how large the models of a run are, without loading their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capgap.pipeline.student.shapes import shape_of, target_shape, teacher_config
from capgap.schemas.errors import CapgapError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.manifest import Manifest
from capgap.schemas.plan import Figure
from capgap.schemas.run_model import ModelShape, TeacherSettings
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_prune import PruneSettings
from capgap.schemas.run_quantize import QuantizeSettings

_FLOAT32_BYTES, _BFLOAT16_BYTES = 4, 2
# a checkpoint holds the weights and AdamW's two moments, each in the dtype of the weights
_IN_A_CHECKPOINT = 3


@dataclass(frozen=True)
class ModelSize:
    """Sizes of one model.

    Attributes:
        total: Number of all parameters, tied ones counted once; None where it is not known.
        outside_embedding: Number of parameters without embedding and head; None where it is not known.
        where: What the parameters were counted from, or why they are not known.
        tied: Whether embedding and head are one matrix; assumed to be true where that is not known.
        weight_bytes: Bytes of one weight as the model is saved before it is trained.
    """

    total: float | None
    outside_embedding: float | None
    where: str
    tied: bool = True
    weight_bytes: int = _FLOAT32_BYTES

    @property
    def figure(self) -> Figure:
        """All parameters, with the source of their number."""
        return Figure(value=self.total, source=self.where)

    def packed_bytes(self, settings: QuantizeSettings) -> float | None:
        """Return the bytes of the served weights: quantised linear layers, and 16 bits for all other weights."""
        if self.total is None or self.outside_embedding is None:
            return None
        few, ends = settings.bits_per_weight / 8, self.total - self.outside_embedding
        if not settings.head and not settings.embedding:
            return ends * 2 + self.outside_embedding * few
        one = ends if self.tied else ends / 2
        each = (few if is_few else 2 for is_few in (settings.head, settings.embedding))
        return one * sum(each) + self.outside_embedding * few


def weight_bytes(settings: OptimizationSettings) -> int:
    """Return the bytes of one weight while it is trained with these settings, and as it is saved afterwards."""
    return _BFLOAT16_BYTES if settings.precision == "bf16-true" else _FLOAT32_BYTES


def checkpoint_bytes(settings: OptimizationSettings) -> int:
    """Return the bytes of one checkpoint of a training, for each parameter."""
    return _IN_A_CHECKPOINT * weight_bytes(settings)


def num_checkpoints(settings: OptimizationSettings) -> int:
    """Return the largest number of checkpoints on the disk: those that are kept, and the next while it is written."""
    return settings.keep_checkpoints + 1


def model_size(
    manifest: Manifest | None, path: str | None, shape: ModelShape | None, vocab_size: float | None
) -> ModelSize:
    """Return the size of a finished stage's model, a given model, or a shape: the first of these that is not None."""
    if manifest is not None and "num_parameters" in manifest.facts:
        facts = ModelFacts.model_validate(manifest.facts)
        held = _weight_bytes_in(manifest, facts.num_parameters)
        sizes = facts.num_parameters, facts.num_non_embedding_parameters
        return ModelSize(*sizes, "its manifest", weight_bytes=held)
    if path is not None:
        from capgap.pipeline.models.configs import load_config
        from capgap.pipeline.models.load import model_facts
        from capgap.pipeline.models.tokenizers import load_tokenizer

        try:
            config = load_config(path)
            facts = model_facts(config, load_tokenizer(path), path)
        except CapgapError as error:
            return ModelSize(None, None, f"cannot be counted: {error}")
        sizes = facts.num_parameters, facts.num_non_embedding_parameters
        tied = bool(config.tie_word_embeddings)
        return ModelSize(*sizes, f"the configuration of {path}", tied, _weight_bytes_of(config))
    if shape is not None:
        outside = shape_parameters(shape)
        if vocab_size is None:
            return ModelSize(None, outside, "the size of its embedding depends on a tokenizer that cannot be read")
        embedding = vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
        return ModelSize(outside + embedding, outside, "its shape", shape.tie_word_embeddings)
    return ModelSize(None, None, "not known before it is made")


def pruned_size(
    manifest: Manifest | None, settings: PruneSettings, teacher: TeacherSettings, vocab_size: float | None
) -> ModelSize:
    """Return the size of a finished stage's model, or of the teacher's configuration, pruned as the settings ask."""
    if manifest is not None:
        return model_size(manifest, None, None, vocab_size)
    from capgap.pipeline.models.configs import empty_model
    from capgap.pipeline.student.cut import pruned_config

    try:
        config = teacher_config(teacher, vocab_size)
        if config is None:
            return ModelSize(None, None, "the size of its embedding depends on a tokenizer that cannot be read")
        target = target_shape(shape_of(config, str(teacher.path)), settings)
        model = empty_model(pruned_config(config, target, list(range(target.num_layers))))
    except CapgapError as error:
        return ModelSize(None, None, f"cannot be counted: {error}")
    total = sum(p.numel() for p in model.parameters())
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    outside = total - sum(end.numel() for end in ends)
    held = _weight_bytes_of(config) if teacher.optimization is None else weight_bytes(teacher.optimization)
    return ModelSize(total, outside, "the teacher's configuration, pruned", len(ends) == 1, held)


def shape_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of a Llama model of that shape, without embedding and head."""
    width = shape.hidden_size
    key_value = width // shape.num_heads * (shape.num_key_value_heads or shape.num_heads)
    attention = 2 * width * width + 2 * width * key_value
    feed_forward = 3 * width * shape.intermediate_size
    norms = 2 * width
    return shape.num_layers * (attention + feed_forward + norms) + width


def _weight_bytes_of(config: Any) -> int:
    """Return the bytes of one weight in the dtype that a model's configuration names; those of float32 without one."""
    return _FLOAT32_BYTES if config.dtype is None else int(config.dtype.itemsize)


def _weight_bytes_in(manifest: Manifest, num_parameters: int) -> int:
    """Return the bytes of one weight in the files that a stage has saved; those of float32 where it has saved none."""
    saved = [file for file in manifest.files if file.path.endswith(".safetensors")]
    # the folder `model` of a student of few bits holds the packed weights
    plain = [file for file in saved if file.path.startswith("high_precision/")] or saved
    return round(sum(file.num_bytes for file in plain) / num_parameters) or _FLOAT32_BYTES
