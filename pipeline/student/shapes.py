"""The shape of a model that can be pruned, and the shape of the pruned model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_model import ModelShape, TeacherSettings
from capgap.schemas.run_prune import PruneSettings

# The layers of these architectures have the same parameters under the same names, which `cut.py` lists.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model.

    Attributes:
        num_layers: Number of layers.
        hidden_size: Number of hidden channels.
        num_heads: Number of query heads in a layer.
        num_key_value_heads: Number of key and value heads in a layer; each serves a group of query heads.
        intermediate_size: Number of neurons in a layer's feed-forward block.
        head_dim: Width of a head.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int

    @property
    def heads_per_group(self) -> int:
        """Number of query heads that share one key and value head."""
        return self.num_heads // self.num_key_value_heads


def shape_of(config: Any, where: str) -> Shape:
    """Return the shape of a model from its configuration.

    Args:
        config: The configuration.
        where: The model's path, for error messages.

    Raises:
        InputError: The architecture cannot be pruned.
    """
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            "models of this architecture cannot be pruned",
            where=where,
            found=config.model_type,
            expected=" or ".join((", ".join(ARCHITECTURES[:-1]), ARCHITECTURES[-1])),
            fix="give student.path or student.model",
        )
    return Shape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )


def target_shape(teacher: Shape, settings: PruneSettings) -> Shape:
    """Return the shape that the settings ask for, with the teacher's sizes where they are left out.

    Raises:
        SettingError: A size is larger than the teacher's, the query heads do not divide among the groups, or a group
            would have more query heads than one of the teacher's.
    """
    sizes = ("num_layers", "hidden_size", "num_heads", "num_key_value_heads", "intermediate_size")
    asked = {name: getattr(settings, name) for name in sizes if getattr(settings, name) is not None}
    for name, value in asked.items():
        if value > getattr(teacher, name):
            raise SettingError(
                "a pruned student is no larger than its teacher",
                where=f"student.prune.{name}",
                found=value,
                expected=f"at most the teacher's {getattr(teacher, name)}",
            )
    target = replace(teacher, **asked)
    heads, groups = target.num_heads, target.num_key_value_heads
    if heads % groups:
        raise SettingError(
            "query heads do not divide among key and value heads",
            where="student.prune.num_heads",
            found=f"{heads} with num_key_value_heads = {groups}"
            + ("" if "num_key_value_heads" in asked else ", the teacher's"),
            expected=f"a multiple of {groups}",
            fix="set student.prune.num_key_value_heads too",
        )
    if target.heads_per_group > teacher.heads_per_group:
        raise SettingError(
            "each of the teacher's groups has fewer query heads than the pruned student needs",
            where="student.prune.num_key_value_heads",
            found=f"{heads} query heads in {groups} groups: {target.heads_per_group} in each",
            expected=f"at most the teacher's {teacher.heads_per_group}",
            fix=f"lower student.prune.num_heads to {groups * teacher.heads_per_group}, or keep more groups",
        )
    return target


def llama_config(shape: ModelShape, vocab_size: int) -> Any:
    """Return the Llama configuration of a fresh model of the given shape, with its sizes only."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads or shape.num_heads,
        tie_word_embeddings=shape.tie_word_embeddings,
    )


def teacher_config(teacher: TeacherSettings, vocab_size: float | None) -> Any:
    """Return the configuration of the teacher that is pruned, or None if the size of its embedding is not known.

    Args:
        teacher: The settings of the teacher.
        vocab_size: Size of the corpus's vocabulary, or None if it is not known.

    Raises:
        InputError: The configuration of a given model cannot be read.
    """
    from capgap.pipeline.models.configs import load_config

    if teacher.path is not None:
        config = load_config(teacher.path)
        if teacher.adapt is not None and vocab_size is not None:
            multiple = teacher.adapt.pad_to_multiple_of or 1
            config.vocab_size = -(-max(config.vocab_size, int(vocab_size)) // multiple) * multiple
        return config
    assert teacher.model is not None
    return None if vocab_size is None else llama_config(teacher.model, int(vocab_size))
