"""Low-bit layers compute what their checkpoint holds, learn as if nothing were rounded, and say what has no format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import gpt2_config, mamba_config, tiny_llama, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.low_bit import (
    LowBitLinear,
    layers_to_quantise,
    low_bit_layers,
    make_low_bit,
    measure_input_scales,
    scheme_of,
)
from capgap.pipeline.models.low_bit_files import save_compressed
from capgap.pipeline.models.trainable import empty_to_train, load_to_train, require_plain
from capgap.schemas.errors import CapgapError, InputError
from capgap.schemas.run_quantize import QuantizeSettings

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 32}
IDS_BL = torch.arange(24).reshape(2, 12) % 40
FORMATS: dict[str, dict[str, Any]] = {
    "int8": {},
    "fp8": {},
    "int4": {"group_size": 32},
    "mxfp4": {},
    "mxfp4 weights": {"activations": False},
    "nvfp4": {},
    "nvfp4 weights": {"activations": False},
}
BITS = {"int8": 8, "fp8": 8, "int4": 4, "mxfp4": 4, "nvfp4": 4}


def _settings(name: str) -> QuantizeSettings:
    return QuantizeSettings(format=name.split()[0], **FORMATS[name])


def _plain(tied: bool = True) -> PreTrainedModel:
    model = tiny_llama(3, tie_word_embeddings=tied, initializer_range=0.2, **SIZES).eval()
    # what a checkpoint keeps in bfloat16 is such already, so that what differs is of the layers alone
    for name, parameter in model.named_parameters():
        if "_proj" not in name:
            parameter.data = parameter.data.bfloat16().float()
    return model


def _made_low_bit(model: PreTrainedModel, settings: QuantizeSettings) -> PreTrainedModel:
    names = layers_to_quantise(model, settings)
    scales = measure_input_scales(model, names, lambda: model(IDS_BL)) if settings.needs_text else None
    make_low_bit(model, names, scheme_of(settings), scales)
    return model


def _saved(model: PreTrainedModel, plain: PreTrainedModel, folder: Path) -> str:
    save_compressed(model, folder / "model")
    plain.save_pretrained(folder / "high_precision")
    return str(folder / "model")


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(IDS_BL).logits
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_the_checkpoint_holds_the_numbers_that_the_layers_compute_with(name: str, tmp_path: Path) -> None:
    settings, plain = _settings(name), _plain()
    exact = _logits(plain)
    model = _made_low_bit(_plain(), settings)
    rounded = _logits(model)
    assert (rounded - exact).abs().max() > 1e-3, "nothing was rounded"
    path = _saved(model, plain, tmp_path)
    served = load_model(path, "cpu", torch.float32)
    for own, layer in low_bit_layers(model).items():
        unpacked, computed = served.get_submodule(own).weight, layer._rounded_weight(layer.weight.detach())
        # nvfp4 is unpacked into bfloat16, of 8 bits
        assert torch.allclose(unpacked, computed, rtol=2**-8 if name.startswith("nvfp4") else 1e-6, atol=0)
    if not name.startswith("nvfp4"):
        assert (_logits(served) - rounded).abs().max() < 1e-5
    again = load_to_train(path, None)
    assert torch.equal(_logits(again), rounded), "what a training goes on from"
    assert low_bit_layers(empty_to_train(path)).keys() == low_bit_layers(model).keys()
    assert low_bit_layers(served) == {}
    weight = load_config(path).quantization_config["config_groups"]["group_0"]["weights"]
    assert weight["num_bits"] == BITS[settings.format]
    packed = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in (tmp_path / "high_precision").glob("*.safetensors"))
    assert packed < whole / 2


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    torch.manual_seed(0)
    of = nn.Linear(64, 8)
    layer = LowBitLinear(of, scheme_of(QuantizeSettings(format="mxfp4")))
    input_NI = torch.randn(5, 64, requires_grad=True)
    gradient_NO = torch.randn(5, 8)
    output_NO = layer(input_NI)
    torch.autograd.backward(output_NO, gradient_NO)
    rounded_NI, rounded_OI = layer._rounded_input(input_NI.detach()), layer._rounded_weight(of.weight.detach())
    # MXFP4 has fifteen values, times a power of two for each group of 32
    assert len(torch.unique(rounded_OI[0, :32])) <= 15 and not torch.equal(rounded_OI, of.weight)
    assert torch.allclose(output_NO, rounded_NI @ rounded_OI.T + of.bias, atol=1e-6)
    assert of.weight.grad is not None and input_NI.grad is not None and of.bias.grad is not None
    assert torch.allclose(of.weight.grad, gradient_NO.T @ rounded_NI, atol=1e-6)
    assert torch.allclose(input_NI.grad, gradient_NO @ rounded_OI, atol=1e-6)


def test_one_matrix_of_vllm_has_one_scale() -> None:
    model = _made_low_bit(_plain(), _settings("nvfp4 weights"))
    attention, feed_forward = model.model.layers[0].self_attn, model.model.layers[0].mlp
    shared = [attention.q_proj, attention.k_proj, attention.v_proj]
    scales = [layer.weight_scales().global_scale for layer in shared]
    assert all(torch.equal(scales[0], one) for one in scales)
    assert feed_forward.gate_proj.fused == (feed_forward.gate_proj, feed_forward.up_proj)
    assert attention.o_proj.fused == (attention.o_proj,)


def test_layers_that_are_named_stay_as_they_are_and_so_does_the_head(tmp_path: Path) -> None:
    settings = QuantizeSettings(format="int8", ignore=("down_proj", "layers.0.self_attn.q_proj"))
    plain = _plain(tied=False)
    model = _made_low_bit(_plain(tied=False), settings)
    plain_ones = {n for n, part in model.named_modules() if type(part) is nn.Linear}
    layers = range(len(model.model.layers))
    downs = {f"model.layers.{number}.mlp.down_proj" for number in layers}
    assert plain_ones == {"lm_head", "model.layers.0.self_attn.q_proj", *downs}
    path = _saved(model, plain, tmp_path)
    assert set(json.loads((Path(path) / "config.json").read_text())["quantization_config"]["ignore"]) == plain_ones
    again = load_to_train(path, None)
    assert {n for n, part in again.named_modules() if type(part) is nn.Linear} == plain_ones


def _refused(model: PreTrainedModel, **settings: Any) -> str:
    with pytest.raises(CapgapError) as refused:
        layers_to_quantise(model, QuantizeSettings(**settings))
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_what_has_no_format_is_named_before_a_weight_is_read() -> None:
    with torch.device("meta"):
        narrow = AutoModelForCausalLM.from_config(tiny_llama(0, hidden_size=48, intermediate_size=96).config)
    said = _refused(narrow, format="int4")
    assert "48 and 96 inputs in model.layers.0.mlp.down_proj" in said and "a multiple of 128, the group of int4" in said
    assert "take int8 or fp8, or name those layers in student.quantize.ignore" in said
    wide = tiny_llama(0, hidden_size=192, intermediate_size=384)
    assert "set student.quantize.group_size to 64 or 32" in _refused(wide, format="int4")
    assert "a multiple of 32, the group of mxfp4" in _refused(narrow, format="mxfp4")
    assert _refused(wide, format="int8", ignore=["up"]).startswith("student.quantize.ignore")
    assert "every linear layer among those" in _refused(
        wide, format="int8", ignore=[f"{n}_proj" for n in "qkvo"] + ["gate_proj", "up_proj", "down_proj"]
    )
    assert "no linear layer beside the head" in _refused(tiny_model(gpt2_config()), format="int8")
    experts = Qwen3MoeConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=2,
        moe_intermediate_size=32,
    )
    assert "weights of more than two dimensions: model.layers.0.mlp.experts." in _refused(
        tiny_model(experts), format="int8"
    )
    # its convolution is small, and stays
    assert layers_to_quantise(tiny_model(mamba_config()), QuantizeSettings(format="int8"))
    twice = _made_low_bit(_plain(), _settings("int8"))
    assert "LowBitLinear in model.layers.0.self_attn.q_proj" in _refused(twice, format="int8")


def test_a_model_that_is_quantised_already_is_named_with_what_it_was_made_of(tmp_path: Path) -> None:
    path = _saved(_made_low_bit(_plain(), _settings("int8")), _plain(), tmp_path)
    with pytest.raises(InputError, match=r"is quantised already; .*compressed-tensors, int-quantized.*high_precision"):
        require_plain(load_config(path), path)
    (tmp_path / "high_precision").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"is quantised already.*give the model that it was made of"):
        load_to_train(path, None)


def test_a_model_without_finite_activations_has_no_scales() -> None:
    model = _plain()
    model.model.norm.weight.data.fill_(1.0)
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="no finite inputs of "):
        _made_low_bit(model, _settings("nvfp4"))
