"""The shape of a model that can be pruned, and the shape that it is to be pruned to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_model import ModelShape, TeacherSettings
from capgap.schemas.run_prune import PruneSettings

# Their layers have the same parts under the same names: see `cut.py`, which names each of them.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like model.

    Attributes:
        num_layers: depth.
        hidden_size: width.
        num_heads: query heads of a layer.
        num_key_value_heads: key and value heads of a layer; each serves a group of query heads.
        intermediate_size: neurons of a feed-forward layer.
        head_dim: width of a head.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int

    @property
    def heads_per_group(self) -> int:
        """Query heads of one key and value head."""
        return self.num_heads // self.num_key_value_heads


def shape_of(config: Any, where: str) -> Shape:
    """The shape of a model of this configuration.

    Raises:
        InputError: its architecture cannot be pruned.
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
    """The shape asked for, with the teacher's sizes where none is.

    Raises:
        SettingError: it is wider or deeper than the teacher, or its heads do not divide into groups that the teacher's
            groups can give.
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
            "a group of the teacher's has fewer query heads than this asks for",
            where="student.prune.num_key_value_heads",
            found=f"{heads} query heads in {groups} groups: {target.heads_per_group} in each",
            expected=f"at most the teacher's {teacher.heads_per_group}",
            fix=f"lower student.prune.num_heads to {groups * teacher.heads_per_group}, or keep more groups",
        )
    return target


def llama_config(shape: ModelShape, vocab_size: int) -> Any:
    """The configuration of a model of that shape with fresh weights, as far as its sizes go."""
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
    """The configuration of the teacher that is pruned; None where its embedding cannot be counted.

    Raises:
        InputError: a given model's cannot be read.
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
