"""A low-bit model's two folders: one that vLLM serves, and one from which a training continues.

model/            low-bit numbers as compressed-tensors packs them; vLLM and transformers open it
high_precision/   the same model with the weights that were trained
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
    """Write the numbers that the model's low-bit layers compute with, and a `config.json` that describes their packing.

    Where head or embedding is quantised, they are written as two matrices, even if they are tied in training.
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
            del state[name]  # a tied weight, which the conversion of dtypes has copied
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
    """Replace the layers of a model in high precision by the low-bit layers of its compressed model.

    Args:
        model: model of the folder `high_precision`, or one without weights; it is changed in place.
        config: configuration of the folder `model`.
        folder: folder of the compressed model, for the measured scales of activations; None for a model without
            weights, which needs no scales.
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
    """Return the description of these layers for `config.json`."""
    one = next(iter(parts.values()))
    group = one.scheme.model_copy(deep=True)
    group.targets = ["Linear" if isinstance(one, nn.Linear) else "Embedding"]
    group.format = infer_module_format(nn.Linear, group).value
    return group


@torch.no_grad()
def _compressed(layer: LowBitLinear | LowBitEmbedding, packing: str) -> dict[str, Tensor]:
    """Return the tensors of a layer by the names within the layer that vLLM expects."""
    scales = layer.weight_scales()
    state = {"weight": layer.weight.detach().float(), "weight_scale": scales.scale}
    if scales.global_scale is not None:
        state["weight_global_scale"] = scales.global_scale
    if isinstance(layer, LowBitLinear) and layer.input_global_scale is not None:
        state[_INPUT_SCALE] = layer.input_global_scale
    packed = BaseCompressor.get_value_from_registry(packing).compress(state, layer.scheme)
    if isinstance(layer, LowBitLinear) and layer.bias is not None:
        packed["bias"] = layer.bias.detach().to(SAVED_DTYPE)
    # the scales of MXFP4 and NVFP4 are packed already; the copies below are needed as two layers may share a scale
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
