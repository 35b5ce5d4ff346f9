"""Builds a model from the kept parts of another.

Weights are selected by index, and nothing is averaged. The width of a head does not change, so rotary positions do not
change either. Biases, and the norms within heads, are cut along with their channels.

If hidden channels are removed, the weight of each norm layer of the residual stream is rescaled. RMSNorm divides by the
root of the mean square of its H channels. The mean square of the h kept channels differs from it, so the norm would
multiply the kept channels by another factor than before: a larger one if they are small, and a smaller one if they are
large. With s the kept channels' share of the sum of squares, which the calibration measures as a mean over tokens,

    weight' = weight * sqrt(s H / h)

restores the factor on average. It is one number for each norm; the differences between tokens are left to the training.
Products with fewer heads or neurons are not rescaled, because the removed ones contributed least.

Legend: N norms, H hidden channels.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from capgap.pipeline.models.configs import empty_model
from capgap.pipeline.student.kept import KeptParts
from capgap.pipeline.student.shapes import Shape
from capgap.schemas.errors import InputError

_BIAS = "self_attn.o_proj.bias"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# What each axis of a parameter indexes: hidden channels, query heads (query), key and value heads (key) or neurons;
# None for an axis that is kept whole.
_AXES: dict[str, tuple[str | None, ...]] = {
    "model.embed_tokens.weight": (None, "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": (None, "hidden"),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.weight": ("key", "hidden"),
    "self_attn.k_proj.bias": ("key",),
    "self_attn.v_proj.weight": ("key", "hidden"),
    "self_attn.v_proj.bias": ("key",),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.o_proj.bias": ("hidden",),
    "self_attn.q_norm.weight": (None,),
    "self_attn.k_norm.weight": (None,),
    "mlp.gate_proj.weight": ("neuron", "hidden"),
    "mlp.gate_proj.bias": ("neuron",),
    "mlp.up_proj.weight": ("neuron", "hidden"),
    "mlp.up_proj.bias": ("neuron",),
    "mlp.down_proj.weight": ("hidden", "neuron"),
    "mlp.down_proj.bias": ("hidden",),
}


def cut(teacher: PreTrainedModel, target: Shape, kept: KeptParts, energy_NH: Tensor) -> PreTrainedModel:
    """Return a model of the kept parts, on the CPU and in the teacher's dtype; the teacher is left unchanged.

    If everything is kept, the result equals the teacher bit for bit.

    Args:
        teacher: The model to cut, on any device.
        target: The shape of the result, which `kept` has.
        kept: The indices of the kept parts.
        energy_NH: Each channel's mean share of the sum of squares of each norm's input, as in `CalibrationStatistics`.

    Raises:
        InputError: The teacher has a parameter that its architecture does not have, or `pruned_config` refuses it.
    """
    config = pruned_config(teacher.config, target, kept.layers.tolist())
    factors = _factors(energy_NH, kept)
    of_layer = {old: new for new, old in enumerate(kept.layers.tolist())}
    weights: dict[str, Tensor] = {}
    for name, weight in teacher.state_dict().items():
        layer, part = _place(name)
        if layer is not None and layer not in of_layer:
            continue
        number = None if layer is None else of_layer[layer]
        cut_weight = _indexed(weight.detach(), _axes_of(name, part, teacher), _indices(kept, number, target.head_dim))
        if (number, part) in factors:
            cut_weight = (cut_weight.float() * factors[number, part]).to(weight.dtype)
        weights[part if number is None else f"model.layers.{number}.{part}"] = cut_weight.cpu()
    if config.model_type != teacher.config.model_type:
        for number in range(target.num_layers):
            weights[f"model.layers.{number}.{_BIAS}"] = torch.zeros(target.hidden_size, dtype=teacher.dtype)
    kind = type(empty_model(config))
    student, found = kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=teacher.dtype, output_loading_info=True
    )
    assert not any(found.values()), found
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def pruned_config(config: Any, target: Shape, layers: list[int]) -> Any:
    """Return the teacher's configuration with the sizes of the target.

    Args:
        config: The teacher's configuration.
        target: The shape of the pruned model.
        layers: The indices of the kept layers.

    Raises:
        InputError: The model is a Qwen2 with a sliding window, and the width of its heads would no longer be
            hidden_size / num_heads.
    """
    values = config.to_dict()
    values |= {
        "num_hidden_layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "intermediate_size": target.intermediate_size,
    }
    if len(layers) < config.num_hidden_layers:
        if values.get("layer_types") is not None:
            values["layer_types"] = [values["layer_types"][layer] for layer in layers]
        if values.get("max_window_layers") is not None:
            values["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in layers)
    if config.model_type == "qwen2":
        if target.num_heads * target.head_dim == target.hidden_size:
            return type(config).from_dict(values)
        return _as_llama(config, values, target)
    values["head_dim"] = target.head_dim
    return type(config).from_dict(values)


def _as_llama(config: Any, values: dict[str, Any], target: Shape) -> LlamaConfig:
    """Return the configuration of the Llama that computes the same as a Qwen2.

    For a Qwen2, vLLM assumes heads of width hidden_size / num_heads, whatever the configuration says; for a Llama it
    reads the width. A Llama with biases on queries, keys and values also has one on the attention's output, here zero.
    """
    if config.use_sliding_window:
        raise InputError(
            "this model cannot be pruned to heads of another width than hidden_size / num_heads",
            where=config.name_or_path or config.model_type,
            found=f"a qwen2 with a sliding window, {target.num_heads} heads of {target.head_dim}",
            expected=f"{target.hidden_size // target.head_dim} heads for a width of {target.hidden_size}",
            fix=f"set student.prune.hidden_size to {target.head_dim} x student.prune.num_heads",
        )
    shared = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "head_dim", "attention_bias", "mlp_bias"}
    return LlamaConfig(
        **{name: values[name] for name in shared if name in values}, attention_bias=True, head_dim=target.head_dim
    )


def _place(name: str) -> tuple[int | None, str]:
    """Split the name of a parameter into the number of its layer, or None, and the name within the layer."""
    found = _LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found else (None, name)


def _axes_of(name: str, part: str, model: PreTrainedModel) -> tuple[str | None, ...]:
    if part not in _AXES:
        raise InputError(
            "this model cannot be pruned",
            where=model.name_or_path or model.config.model_type,
            found=f"a parameter {name}",
            expected=f"only the parameters of transformers' {model.config.model_type}",
        )
    return _AXES[part]


def _indices(kept: KeptParts, layer: int | None, head_dim: int) -> dict[str, Tensor]:
    if layer is None:
        return {"hidden": kept.hidden}
    return {
        "hidden": kept.hidden,
        "query": _rows(kept.heads[layer], head_dim),
        "key": _rows(kept.groups[layer], head_dim),
        "neuron": kept.neurons[layer],
    }


def _rows(heads_N: Tensor, head_dim: int) -> Tensor:
    return (heads_N[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _indexed(weight: Tensor, axes: tuple[str | None, ...], indices: dict[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(axes):
        if axis is not None:
            weight = weight.index_select(dim, indices[axis].to(weight.device))
    return weight


def _factors(energy_NH: Tensor, kept: KeptParts) -> dict[tuple[int | None, str], float]:
    """Return the factors of norm weights by the student's layer and the norm's name; empty if all channels stay."""
    num_all, num_kept = energy_NH.shape[1], len(kept.hidden)
    if num_kept == num_all:
        return {}
    factors_N = (energy_NH[:, kept.hidden].sum(dim=1) * num_all / num_kept).sqrt().tolist()
    found: dict[tuple[int | None, str], float] = {(None, "model.norm.weight"): factors_N[-1]}
    for number, layer in enumerate(kept.layers.tolist()):
        found[number, "input_layernorm.weight"] = factors_N[2 * layer]
        found[number, "post_attention_layernorm.weight"] = factors_N[2 * layer + 1]
    return found
