from __future__ import annotations

import pytest
import torch
from tiny_models import DEEPER, gpt2_config, llama_config, mamba_config, tiny_model, tiny_tokenizer
from tiny_models import save_model as save_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    ViTConfig,
)

from capgap.pipeline.models.configs import load_config
from capgap.pipeline.models.load import load_model, model_facts, model_path, save_model
from capgap.pipeline.stage.context import StageInput
from capgap.schemas.errors import InputError
from capgap.schemas.facts import ModelFacts
from capgap.schemas.manifest import Manifest

PADDED = 320


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def _config(tied: bool) -> LlamaConfig:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return llama_config(vocab_size=PADDED, tie_word_embeddings=tied, **DEEPER, **heads)


# Per layer: queries and outputs 32 x 32 each, keys and values 32 x 16 each, three matrices 32 x 48, two norms of 32.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
OUTSIDE_EMBEDDINGS = 2 * LAYER + 32


@pytest.mark.parametrize("given", ["model", "config"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_counted_and_tied_ones_once(tokenizer, tied: bool, given: str) -> None:
    config = _config(tied)
    facts = model_facts(tiny_model(config) if given == "model" else config, tokenizer)
    assert facts.num_non_embedding_parameters == OUTSIDE_EMBEDDINGS
    assert facts.num_parameters == OUTSIDE_EMBEDDINGS + PADDED * 32 * (1 if tied else 2)
    assert (facts.padded_vocab_size, facts.tokenizer.vocab_size, facts.max_positions) == (PADDED, 280, 64)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (gpt2_config(n_positions=96), 96),
        (MptConfig(max_seq_len=80, d_model=32, n_layers=1, n_heads=2), 80),
        (BloomConfig(hidden_size=32, n_layer=1, n_head=2), None),
        (mamba_config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_positions_are_found_by_any_name_and_some_models_have_no_bound(tokenizer, config, positions) -> None:
    config.vocab_size = PADDED
    facts = model_facts(config, tokenizer)
    assert facts.max_positions == positions
    assert ModelFacts.model_validate(facts.model_dump(mode="json")) == facts


def test_an_architecture_that_is_no_language_model_is_refused(tokenizer) -> None:
    with pytest.raises(InputError, match="vit: this is no causal language model; found Unrecognized configuration"):
        model_facts(ViTConfig(), tokenizer)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_opens_in_transformers_with_equal_logits(tokenizer, tmp_path, tied: bool) -> None:
    model = LlamaForCausalLM(_config(tied)).eval()
    save_model(model, tokenizer, tmp_path)
    ids = torch.arange(20)[None]
    opened, ours = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), load_model(str(tmp_path), "cpu")
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert torch.equal(opened(input_ids=ids).logits, expected)
        assert torch.equal(ours(input_ids=ids).logits, expected)
    assert not ours.training
    assert model_facts(opened, tokenizer) == model_facts(model, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_a_model_is_loaded_in_the_dtype_it_was_saved_in_or_in_the_one_asked_for(tokenizer, tmp_path) -> None:
    save_model(LlamaForCausalLM(_config(True)).bfloat16(), tokenizer, tmp_path)
    assert load_model(str(tmp_path), "cpu").dtype == torch.bfloat16
    assert load_model(str(tmp_path), "cpu", torch.float32).dtype == torch.float32


@pytest.mark.usefixtures("without_16_bits")
def test_where_its_own_dtype_is_slow_a_model_is_warned_of_or_read_into_float32(tokenizer, tmp_path, caplog) -> None:
    save_model(LlamaForCausalLM(_config(True)).bfloat16(), tokenizer, tmp_path)
    assert load_model(str(tmp_path), "cpu", "fast").dtype == torch.float32
    assert load_model(str(tmp_path), "cpu", to_compute=False).dtype == torch.bfloat16
    assert not caplog.records
    assert load_model(str(tmp_path), "cpu").dtype == torch.bfloat16
    assert f"{tmp_path} works in bfloat16" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_no_device_is_slow_in_is_measured_in_its_own_dtype(tokenizer, tmp_path, dtype) -> None:
    save_model(LlamaForCausalLM(_config(True)).to(dtype), tokenizer, tmp_path)
    assert load_model(str(tmp_path), "cpu", "fast").dtype == dtype


def test_what_is_no_model_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/no: no model can be found.*expected a Hugging Face folder"):
        load_config(str(tmp_path / "no"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json names no architecture; found nothing in it"):
        load_model(str(tmp_path), "cpu")
    _config(True).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path}: no weights as safetensors"):
        load_model(str(tmp_path), "cpu")


def test_the_path_of_a_made_model_is_below_its_stage_and_that_of_a_given_one_is_as_given(tokenizer, tmp_path) -> None:
    def made(path: str) -> StageInput:
        facts = model_facts(_config(True), tokenizer, path).model_dump(mode="json")
        manifest = Manifest(
            stage="teacher",
            instance="teacher",
            settings={},
            inputs={},
            identity="0",
            content="1",
            files=(),
            facts=facts,
            versions={},
            started="2026-01-01T00:00:00Z",
            wall_s=1.0,
            command=(),
        )
        return StageInput(tmp_path, manifest)

    assert model_path(made("model")) == str(tmp_path / "model")
    assert model_path(made("/models/llama")) == "/models/llama"


def test_a_cap_on_attentions_logits_is_kept(tmp_path) -> None:
    """The attention that transformers takes by itself leaves it out, and the model is another."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 48, "query_pre_attn_scalar": 16}
    config = Gemma2Config(**sizes, attn_logit_softcapping=0.5, initializer_range=0.3)
    folder = save_tiny_model(tmp_path, tiny_model(config))
    tokens = torch.arange(24)[None] % 48
    loaded = load_model(folder, "cpu")
    wanted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(tokens).logits
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")(tokens).logits
    assert torch.equal(loaded(tokens).logits, wanted)
    assert (plain - wanted).abs().max() > 0.1, "a cap that matters"
