"""A low-bit model's two folders: what vLLM serves, and what a training goes on from.

model/            numbers of few bits as compressed-tensors packs them; vLLM and transformers open it
high_precision/   the same model, its weights as they were trained
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.pipeline.models.low_bit import (
    SAVED_DTYPE,
    LowBitEmbedding,
    LowBitLinear,
    eager_on,
    low_bit_embedding,
    low_bit_layers,
    make_low_bit,
    make_low_bit_embedding,
    needs_input_scales,
)

_INPUT_SCALE = "input_global_scale"


def save_compressed(model: PreTrainedModel, folder: Path) -> None:
    """Write the numbers that the model's low-bit layers compute with, and a `config.json` that says how they lie.

    Head and embedding are two matrices there where either of them is quantised, though they may be trained as one.
    """
    layers, tables = low_bit_layers(model), low_bit_embedding(model)
    grouped: list[Mapping[str, LowBitLinear | LowBitEmbedding]] = [layers, tables]
    groups = {f"group_{number}": _scheme_of(parts) for number, parts in enumerate(grouped) if parts}
    state = {
        name: value.to(SAVED_DTYPE) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not any(name.rpartition(".")[0] in parts for parts in grouped)
    }
    head = next((name for name, one in layers.items() if one is model.get_output_embeddings()), None)
    if head is not None:
        groups["group_0"].targets.insert(0, head)  # vLLM's head is no `Linear` by its class
    ends = {"tie_word_embeddings": False} if tables or head is not None else {}
    if not ends:
        for name in set(model.all_tied_weights_keys) & set(state):
            del state[name]  # the same as another, of which a copy was made
    for group, parts in zip(groups.values(), grouped, strict=False):
        for name, part in parts.items():
            with eager_on(part.weight.device):
                state |= {f"{name}.{own}": value for own, value in _compressed(part, str(group.format)).items()}
    model.save_pretrained(folder, state_dict=state)
    file = folder / "config.json"
    dtype = {"dtype": str(SAVED_DTYPE).removeprefix("torch.")}
    file.write_text(json.dumps(json.loads(file.read_text()) | dtype | ends))
    formats = {str(group.format) for group in groups.values()}
    config = QuantizationConfig(
        config_groups=dict(groups),
        format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in layers],
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))


def as_compressed(model: PreTrainedModel, config: Any, folder: Path | None = None) -> None:
    """Make the layers of a model in high precision those of the compressed one.

    Args:
        model: of the folder `high_precision`, or without weights; changed in place.
        config: of the folder `model`.
        folder: of the compressed model, whose activations may have scales that were measured; not needed for a model
            without weights.
    """
    written = QuantizationConfig.model_validate(dict(config.quantization_config))
    groups, left_out = written.config_groups, written.ignore or ()
    scheme = groups["group_0"]
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear and name not in left_out]
    wanted = needs_input_scales(scheme) and folder is not None
    make_low_bit(model, names, scheme, _input_scales(folder, names) if wanted and folder is not None else None)
    if "group_1" in groups:
        make_low_bit_embedding(model, groups["group_1"])


def _scheme_of(parts: Mapping[str, LowBitLinear | LowBitEmbedding]) -> QuantizationScheme:
    """What `config.json` says of them."""
    one = next(iter(parts.values()))
    group = one.scheme.model_copy(deep=True)
    group.targets = ["Linear" if isinstance(one, nn.Linear) else "Embedding"]
    group.format = infer_module_format(nn.Linear, group).value
    return group


@torch.no_grad()
def _compressed(layer: LowBitLinear | LowBitEmbedding, packing: str) -> dict[str, Tensor]:
    """The layer's tensors by their own names, as vLLM looks for them."""
    scales = layer.weight_scales()
    state = {"weight": layer.weight.detach().float(), "weight_scale": scales.scale}
    if scales.global_scale is not None:
        state["weight_global_scale"] = scales.global_scale
    if isinstance(layer, LowBitLinear) and layer.input_global_scale is not None:
        state[_INPUT_SCALE] = layer.input_global_scale
    packed = BaseCompressor.get_value_from_registry(packing).compress(state, layer.scheme)
    if isinstance(layer, LowBitLinear) and layer.bias is not None:
        packed["bias"] = layer.bias.detach().to(SAVED_DTYPE)
    # those of groups of powers of two and of FP8 are packed already; two layers may share the scale of both
    if packed["weight_scale"].dtype == torch.float32:
        packed["weight_scale"] = packed["weight_scale"].to(SAVED_DTYPE)
    return {name: value.clone().contiguous() for name, value in packed.items()}


def _input_scales(folder: Path, names: list[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            kept = [key for key in tensors.keys() if key.endswith(f".{_INPUT_SCALE}")]  # noqa: SIM118  # no mapping
            found |= {key.removesuffix(f".{_INPUT_SCALE}"): tensors.get_tensor(key) for key in kept}
    return {name: found[name] for name in names}
