"""A model of the kept parts of another.

Weights are indexed, nothing is averaged. The width of a head stays, so rotary positions do. Biases, and norms within a
head, go with their channels. What is scaled anew is the weight of each norm of the residual stream, and only where
channels go. RMSNorm divides by the root of the mean square of its H channels; of the h that stay the mean square is
another, so the same channels would come out by another factor: larger where small ones stay, smaller where large ones
do. With s the share of the channels that stay in the sum of squares, known from the calibration as a mean over tokens,

    weight' = weight * sqrt(s H / h)

gives what stays the mean square that it had. It is one factor a norm; what stays of it token by token is left to the
training. Products with fewer heads or neurons are not scaled: what goes is what added least.

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
# Axes of each parameter, by the part of the model: hidden, query (rows of query heads), key (of key and value heads),
# neuron; None for one that stays whole.
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
    """The kept parts as a model of their own, on the CPU, in the teacher's dtype; the teacher is left as it was.

    With everything kept it is the teacher, to the bit.

    Args:
        teacher: on any device.
        target: the shape that `kept` has.
        kept: indices of what stays.
        energy_NH: mean share of each channel in the square of each norm's input; see `CalibrationStatistics`.

    Raises:
        InputError: it has a parameter of a name that its architecture has not.
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
    """The teacher's configuration with the target's sizes; `layers` are those that stay.

    Raises:
        InputError: a Qwen2 with a sliding window whose heads are no longer hidden_size / num_heads wide.
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
    """A Qwen2 as the Llama that computes the same.

    vLLM takes a Qwen2's heads to be hidden_size / num_heads wide, whatever its configuration says; a Llama's it does
    not. A Llama whose queries, keys and values have biases has one behind its attention too, which is zero here.
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
    """Layer and part of a parameter."""
    found = _LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found else (None, name)


def _axes_of(name: str, part: str, model: PreTrainedModel) -> tuple[str | None, ...]:
    if part not in _AXES:
        raise InputError(
            "this model cannot be pruned",
            where=model.name_or_path or model.config.model_type,
            found=f"a parameter {name}",
            expected=f"those of {model.config.model_type} as transformers has it",
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
    """Factors by layer of the student and name of each norm of the residual stream; none where all channels stay."""
    num_all, num_kept = energy_NH.shape[1], len(kept.hidden)
    if num_kept == num_all:
        return {}
    factors_N = (energy_NH[:, kept.hidden].sum(dim=1) * num_all / num_kept).sqrt().tolist()
    found: dict[tuple[int | None, str], float] = {(None, "model.norm.weight"): factors_N[-1]}
    for number, layer in enumerate(kept.layers.tolist()):
        found[number, "input_layernorm.weight"] = factors_N[2 * layer]
        found[number, "post_attention_layernorm.weight"] = factors_N[2 * layer + 1]
    return found
