"""Low-bit layers compute what their checkpoint holds, learn as if nothing were rounded, and say what has no format."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import gpt2_config, mamba_config, tiny_llama, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.head_product import sum_head_in_float32
from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.low_bit import (
    LowBitEmbedding,
    LowBitLinear,
    layers_to_quantise,
    low_bit_embedding,
    low_bit_layers,
    make_low_bit,
    make_low_bit_embedding,
    measure_input_scales,
    scheme_of,
)
from capgap.pipeline.models.low_bit_files import save_compressed
from capgap.pipeline.models.trainable import empty_to_train, load_to_train, require_plain
from capgap.pipeline.train.faster import compile_layers
from capgap.pipeline.train.heads import served_head
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
    if settings.embedding:
        make_low_bit_embedding(model, scheme_of(settings, weights_alone=True))
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


BOTH = {"head": True, "embedding": True}


@pytest.mark.parametrize(
    ("given", "tied"),
    [
        ({"format": "int8", **BOTH}, True),
        ({"format": "int8", **BOTH}, False),
        ({"format": "int8", "embedding": True}, True),
        ({"format": "int4", "group_size": 32, **BOTH}, True),
        ({"format": "fp8", "head": True}, False),
        ({"format": "mxfp4", "head": True}, True),
        ({"format": "nvfp4", "head": True}, True),
    ],
)
def test_head_and_embedding_are_rounded_by_choice_and_saved_as_two(
    given: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    settings, plain = QuantizeSettings(**given), _plain(tied)
    inside = _logits(_made_low_bit(_plain(tied), settings.model_copy(update={"head": False, "embedding": False})))
    model = _made_low_bit(_plain(tied), settings)
    rounded, ends = _logits(model), (model.get_input_embeddings(), model.get_output_embeddings())
    assert (rounded - inside).abs().max() > 1e-3, "neither was rounded"
    assert [type(end) for end in ends] == [
        LowBitEmbedding if settings.embedding else nn.Embedding,
        LowBitLinear if settings.head else nn.Linear,
    ]
    assert (ends[0].weight is ends[1].weight) == tied
    path = _saved(model, plain, tmp_path)
    config = load_config(path)
    assert config.tie_word_embeddings is False and ("lm_head" in config.quantization_config["ignore"]) != settings.head
    served = load_model(path, "cpu", torch.float32)
    for own, end in low_bit_embedding(model).items():
        assert torch.allclose(served.get_submodule(own).weight, end.rounded(end.weight.detach()), rtol=1e-6, atol=0)
    if settings.format != "nvfp4":
        assert (_logits(served) - rounded).abs().max() < 1e-5
    again = load_to_train(path, None)
    # what eval makes of a head in bfloat16 rounds its input as the trained one does; weights then have 8 bits at most
    narrow, hidden_NH = load_model(path, "cpu"), torch.randn(50, 64).bfloat16()
    sum_head_in_float32(narrow)
    with torch.no_grad():
        found, wanted = narrow.get_output_embeddings()(hidden_NH), again.get_output_embeddings()(hidden_NH.float())
    assert found.dtype == torch.float32 and (found - wanted).abs().max() < 2**-6 * wanted.std()
    assert torch.equal(_logits(again), rounded), "what a training goes on from"
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == tied
    empty = empty_to_train(path)
    assert sum(p.numel() for p in empty.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_fused_loss_sees_the_rounded_head_and_its_gradients_reach_the_weights() -> None:
    settings = QuantizeSettings(format="int8", head=True, embedding=True)
    model = _made_low_bit(_plain(), settings)
    head = served_head(model, 40)
    hidden_BLH = head.decoder(input_ids=IDS_BL).last_hidden_state
    read = head.inputs(hidden_BLH)
    assert torch.equal(read["weight_VH"], head.linear._rounded_weight(head.linear.weight))
    assert torch.equal(read["hidden_NH"], head.linear._rounded_input(hidden_BLH).flatten(0, 1))
    labels_N = IDS_BL.roll(-1, 1).flatten()
    nothing_N1 = torch.zeros((len(labels_N), 1))
    targets = SparseTargets(nothing_N1.long(), nothing_N1, None)
    linear_sparse_kl(
        **read, targets=targets, labels_N=labels_N, alpha=0.0, vocab_size=40, want_kl=False
    ).loss.backward()
    found, model.get_input_embeddings().weight.grad = model.get_input_embeddings().weight.grad, None
    logits_NV = model(IDS_BL).logits.flatten(0, 1)[:, :40]
    nn.functional.cross_entropy(logits_NV, labels_N).backward()
    wanted = model.get_input_embeddings().weight.grad
    # sums in another order
    assert found.abs().max() > 1e-4 and torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.slow
def test_layers_that_are_compiled_round_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # traced, and run as it is: what a C++ compiler makes of it is not asked here
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    found = []
    for is_compiled in (False, True):
        model = _made_low_bit(_plain(), _settings("mxfp4"))
        if is_compiled:
            compile_layers(model, model.get_decoder(), torch.device("cpu"))
        logits_BLV = model(IDS_BL).logits
        logits_BLV.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((logits_BLV.detach(), gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.allclose(gradient, found[1][1][name], atol=1e-6) for name, gradient in found[0][1].items())


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
    assert "every linear layer in student.quantize.ignore" in _refused(
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
