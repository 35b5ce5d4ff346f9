"""A model whose weights are missing, of another shape or under other names is refused before any of them is read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from capgap.pipeline.models.complete import _common_prefix, require_complete
from capgap.pipeline.models.load import load_model
from capgap.schemas.errors import InputError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DOWN = "model.layers.1.mlp.down_proj.weight"
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=3),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "deepseek-v3": lambda: DeepseekV3Config(
        **SIZES, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    ),
    "gpt-oss": lambda: GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, head_dim=8),
    "falcon-h1": lambda: FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_state=8, mamba_d_head=8),
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, **ENDS),
    "opt": lambda: OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        **ENDS,
    ),
    "bloom": lambda: BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2, **ENDS),
    "mamba": lambda: MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, **ENDS),
}  # fmt: skip


def _saved(folder: Path, name: str = "llama", **how: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder, **how)
    return folder


def _changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    file = folder / "model.safetensors"
    save_file({name: one.contiguous() for name, one in change(load_file(file)).items()}, file, {"format": "pt"})
    return folder


def _without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {name: one for name, one in weights.items() if name not in names}


def _refused(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        require_complete(str(folder))
    return str(refused.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_as_transformers_saves_it_is_complete(tmp_path: Path, name: str) -> None:
    require_complete(str(_saved(tmp_path, name)))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_missing_tensor_is_found_in_any_architecture(tmp_path: Path, name: str) -> None:
    folder = _saved(tmp_path, name)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights or name != "qwen2-tied"
    for missing in list(weights)[::3]:
        _changed(folder, lambda _, gone=missing: {one: weights[one] for one in weights if one != gone})
        with pytest.raises(InputError, match="the weights are not those of the model"):
            require_complete(str(folder))


def test_shards_half_precision_and_a_head_of_its_own_are_read_too(tmp_path: Path) -> None:
    folder = _saved(tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    require_complete(str(folder))
    half = tmp_path / "half"
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).to(torch.bfloat16).save_pretrained(half)
    require_complete(str(half))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    said = _refused(_changed(_saved(tmp_path), _without(DOWN)))
    assert said.startswith(f"{tmp_path}: the weights are not those of the model that config.json describes; ")
    assert f"found 1 missing: {DOWN}, expected every tensor of LlamaForCausalLM, and no other" in said


def test_many_are_counted_and_some_named(tmp_path: Path) -> None:
    said = _refused(_changed(_saved(tmp_path), lambda weights: {"model.norm.weight": weights["model.norm.weight"]}))
    assert "found 20 missing: lm_head.weight, model.embed_tokens.weight, " in said and " and 17 more" in said


@pytest.mark.parametrize(
    ("prefix", "who"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel"),
        ("base_model.model.", "PEFT, whose adapters are not merged"),
        ("_fsdp_wrapped_module.", "FSDP"),
    ],
)
def test_the_prefix_of_a_wrapper_is_named_as_what_it_is(tmp_path: Path, prefix: str, who: str) -> None:
    folder = _changed(_saved(tmp_path), lambda weights: {prefix + name: one for name, one in weights.items()})
    said = _refused(folder)
    assert "21 missing: " in said and "21 unexpected: " in said
    assert f"save the model without its wrapper: {prefix!r} in the names is put there by {who}" in said


def test_a_wrapper_within_a_name_is_named_too(tmp_path: Path) -> None:
    wrap = lambda weights: {  # noqa: E731
        name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): one for name, one in weights.items()
    }
    assert "is put there by activation checkpointing" in _refused(_changed(_saved(tmp_path), wrap))


def test_a_prefix_that_nobody_knows_is_named_where_everything_has_it(tmp_path: Path) -> None:
    folder = _changed(_saved(tmp_path), lambda weights: {f"student.net.{name}": one for name, one in weights.items()})
    assert "take the prefix 'student.net.' out of the tensors' names" in _refused(folder)


def test_the_names_of_many_experts_are_compared_once_and_not_once_for_each_name() -> None:
    """A mixture of experts has thousands of unexpected names, where all experts of a layer are one tensor."""

    class Counted(set[str]):
        passes = 0

        def __iter__(self) -> Iterator[str]:
            Counted.passes += 1
            return super().__iter__()

    missing = Counted(f"model.layers.{layer}.experts.down" for layer in range(48))
    experts = {f"net.model.layers.{layer}.experts.{n}.down" for layer in range(48) for n in range(16)}
    assert _common_prefix(missing, experts) is None
    assert _common_prefix(missing, experts | {f"net.{name}" for name in missing}) == "net."
    assert Counted.passes <= 5, "the names were gone through for each of hundreds of unexpected ones"


def test_another_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = _changed(_saved(tmp_path), lambda weights: weights | {DOWN: torch.zeros(32, 40)})
    assert f"found 1 of another shape or type: {DOWN} 32x40, not 32x48" in _refused(folder)


def test_an_expert_of_another_shape_is_found(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    _refused(_changed(_saved(tmp_path, "mixtral"), lambda weights: weights | {name: torch.zeros(32, 40)}))


def test_more_layers_or_biases_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    more = {"model.layers.2.mlp.down_proj.weight": torch.zeros(32, 48)}
    assert "1 unexpected: model.layers.2.mlp.down_proj.weight" in _refused(
        _changed(_saved(tmp_path), lambda w: w | more)
    )
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    folder = _changed(_saved(tmp_path / "bias"), lambda weights: weights | bias)
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in _refused(folder)


def test_what_stands_beside_a_language_model_is_left_out_and_said(tmp_path: Path, caplog) -> None:
    beside = {
        "v_head.summary.weight": torch.zeros(1, 32),
        "vision_tower.patch.weight": torch.zeros(4, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    with caplog.at_level("INFO", "capgap"):
        require_complete(str(_changed(_saved(tmp_path), lambda weights: weights | beside)))
    assert "tensors beside the language model are left out: v_head.summary.weight, vision_tower.patch" in caplog.text


def test_whole_numbers_where_weights_should_be_are_refused(tmp_path: Path) -> None:
    folder = _changed(_saved(tmp_path), lambda weights: weights | {DOWN: weights[DOWN].to(torch.int8)})
    assert f"{DOWN} of type I8, without a quantization_config" in _refused(folder)


def test_a_tied_head_need_not_be_there_and_one_of_its_own_must(tmp_path: Path) -> None:
    require_complete(str(_saved(tmp_path / "tied", "qwen2-tied")))
    embedding = "model.embed_tokens.weight"
    assert f"missing: lm_head.weight, {embedding}" in _refused(_changed(tmp_path / "tied", _without(embedding)))
    assert "1 missing: lm_head.weight" in _refused(_changed(_saved(tmp_path / "untied"), _without("lm_head.weight")))


def test_a_body_saved_without_its_head_lacks_the_head(tmp_path: Path) -> None:
    AutoModel.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "body")
    assert "1 missing: lm_head.weight" in _refused(tmp_path / "body")
    AutoModel.from_config(CONFIGS["qwen2-tied"]()).save_pretrained(tmp_path / "tied")
    require_complete(str(tmp_path / "tied"))


def test_a_quantised_model_may_have_other_tensors_in_each_module_but_none_may_be_empty(tmp_path: Path) -> None:
    def pack(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        packed = {}
        for name, one in weights.items():
            if "_proj" not in name:
                packed[name] = one
                continue
            stem = name.removesuffix("weight")
            packed |= {f"{stem}qweight": torch.zeros(4, 4, dtype=torch.int32), f"{stem}scales": torch.zeros(1, 4)}
        return packed

    folder = _changed(_saved(tmp_path), pack)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(config))
    require_complete(str(folder))
    stem = DOWN.removesuffix("weight")
    assert f"1 missing: {DOWN}" in _refused(_changed(folder, _without(f"{stem}qweight", f"{stem}scales")))


def test_a_git_lfs_pointer_is_named_as_one(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
    )
    said = _refused(folder)
    assert "found a Git LFS pointer in the place of model.safetensors" in said and "git lfs pull" in said


@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_download_that_broke_off_is_named_with_both_lengths(tmp_path: Path, share: float) -> None:
    file = _saved(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    said = _refused(tmp_path)
    assert f"model.safetensors ends too early: {int(len(whole) * share)} bytes, of {len(whole)}" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ends too early: 0 bytes, which is not even its header"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "ends too early: 10 bytes, which is not even its header"),
        (b"<!doctype html><html>Please log in</html>", "begins with '<!doctype html><html>Ple', a page or text"),
        (b'{"error": "not found, and so on"}', "a page or text"),
        (bytes(64), "model.safetensors: "),
    ],
    ids=["empty", "within-the-header", "page", "json", "zeros"],
)
def test_what_lies_in_the_place_of_weights_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (_saved(tmp_path) / "model.safetensors").write_bytes(content)
    refused = _refused(tmp_path)
    assert "the file is not a complete safetensors file" in refused and said in refused


def test_more_bytes_than_the_header_says_are_refused(tmp_path: Path) -> None:
    file = _saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert "goes on too long" in _refused(tmp_path)


def test_a_shard_that_the_index_names_and_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = _saved(tmp_path, max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    number = len(shards)
    said = _refused(folder)
    assert (
        f"found {number - 1} of the {number} that model.safetensors.index.json names, expected {shards[1].name}" in said
    )


def test_a_tensor_that_the_index_names_and_no_shard_holds_is_missing(tmp_path: Path) -> None:
    folder = _saved(tmp_path, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / index[DOWN]
    save_file(_without(DOWN)(load_file(file)), file, {"format": "pt"})
    assert f"1 missing: {DOWN}" in _refused(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = _saved(tmp_path, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(text)
    assert "the index of the weights cannot be read" in _refused(folder)


def test_pickled_weights_alone_are_named_and_not_opened(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = _refused(folder)
    assert "no weights as safetensors; found only pytorch_model.bin" in said and "convert the pickled weights" in said


def test_an_adapter_without_its_model_is_named(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "found an adapter of PEFT without its model" in _refused(folder)


def test_nothing_is_loaded_of_a_model_that_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"1 missing: {DOWN}"):
        load_model(str(_changed(_saved(tmp_path), _without(DOWN))), "cpu")


def test_no_weights_are_read(tmp_path: Path) -> None:
    """Of twenty gigabytes, in a file without blocks: reading them would take minutes, and more memory than there is."""
    config = LlamaConfig(**SIZES | {"vocab_size": 1 << 20, "hidden_size": 4800}, tie_word_embeddings=True, head_dim=8)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header, end = {}, 0
    for name, one in model.named_parameters():
        size = 4 * one.numel()
        header[name] = {"dtype": "F32", "shape": list(one.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    started = time.process_time()
    require_complete(str(tmp_path))
    assert end > 18 << 30 and time.process_time() - started < 60  # the wall clock would depend on the machine's load
