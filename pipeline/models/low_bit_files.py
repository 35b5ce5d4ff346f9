"""A low-bit model's two folders: what vLLM serves, and what a training goes on from.

model/            numbers of few bits as compressed-tensors packs them; vLLM and transformers open it
high_precision/   the same model, its weights as they were trained
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.pipeline.models.low_bit import (
    SAVED_DTYPE,
    LowBitLinear,
    eager_on,
    low_bit_layers,
    make_low_bit,
    needs_input_scales,
)

_INPUT_SCALE = "input_global_scale"


def save_compressed(model: PreTrainedModel, folder: Path) -> None:
    """Write the numbers that the model's low-bit layers compute with, and a `config.json` that says how they lie."""
    layers = low_bit_layers(model)
    scheme = next(iter(layers.values())).scheme
    packing = infer_module_format(nn.Linear, scheme)
    state = {
        name: value.to(SAVED_DTYPE) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in layers
    }
    for name in set(model.all_tied_weights_keys) & set(state):
        del state[name]  # the same as another, of which a copy was made
    for name, layer in layers.items():
        with eager_on(layer.weight.device):
            state |= {f"{name}.{own}": value for own, value in _compressed(layer, packing.value).items()}
    model.save_pretrained(folder, state_dict=state)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": str(SAVED_DTYPE).removeprefix("torch.")}))
    plain = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name not in layers]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=packing.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=plain,
    )
    ModelCompressor(quantization_config=config).update_config(str(folder))


def scheme_in(config: Any) -> tuple[QuantizationScheme, frozenset[str]]:
    """The scheme that `save_compressed` wrote into a configuration, and the linear layers that it leaves out."""
    written = QuantizationConfig.model_validate(dict(config.quantization_config))
    (scheme,) = written.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    return scheme, frozenset(written.ignore or ())


def as_compressed(model: PreTrainedModel, config: Any, folder: Path | None = None) -> None:
    """Make the layers of a model in high precision those of the compressed one.

    Args:
        model: of the folder `high_precision`, or without weights; changed in place.
        config: of the folder `model`.
        folder: of the compressed model, whose activations may have scales that were measured; not needed for a model
            without weights.
    """
    scheme, left_out = scheme_in(config)
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear and name not in left_out]
    wanted = needs_input_scales(scheme) and folder is not None
    make_low_bit(model, names, scheme, _input_scales(folder, names) if wanted and folder is not None else None)


@torch.no_grad()
def _compressed(layer: LowBitLinear, packing: str) -> dict[str, Tensor]:
    """The layer's tensors by their own names, as vLLM looks for them."""
    scales = layer.weight_scales()
    state = {"weight": layer.weight.detach().float(), "weight_scale": scales.scale}
    if scales.global_scale is not None:
        state["weight_global_scale"] = scales.global_scale
    if layer.input_global_scale is not None:
        state[_INPUT_SCALE] = layer.input_global_scale
    packed = BaseCompressor.get_value_from_registry(packing).compress(state, layer.scheme)
    if layer.bias is not None:
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
