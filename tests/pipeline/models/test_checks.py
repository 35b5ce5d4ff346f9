from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import llama_config, mamba_config, save_model, tiny_llama, tiny_model, tiny_tokenizer
from transformers import BartConfig, PreTrainedTokenizerFast

from capgap.pipeline.models.checks import check_given_model, corpus_tokenizer, fresh_model, seq_len_of
from capgap.pipeline.models.tokenizers import tokenizer_facts
from capgap.pipeline.stage.context import StageInput
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.facts import CorpusFacts
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.run_model import ModelShape

SEQ_LEN = 32
SHAPE = ModelShape(hidden_size=32, num_layers=1, num_heads=4, num_key_value_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(vocab_size=300)


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory) -> StageInput:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer.save_pretrained(folder / "tokenizer")
    facts = CorpusFacts(
        tokenizer=tokenizer_facts(tokenizer),
        context="packed",
        splits={},
        text_sources=("text",),
        whole_conversations=False,
    )
    shard_set = ShardSet(codec="sequences-planes-1", codec_settings={}, seq_len=SEQ_LEN, shards=())
    manifest = Manifest(
        stage="corpus",
        instance="corpus",
        settings={},
        inputs={},
        identity="0",
        content="1",
        files=(),
        facts=facts.model_dump(mode="json"),
        shard_sets={"student": shard_set},
        versions={},
        started="2026-01-01T00:00:00Z",
        wall_s=1.0,
        command=(),
    )
    return StageInput(folder, manifest)


def _given(folder: Path, tokenizer, vocab_size: int = 320, positions: int = SEQ_LEN, weights: bool = True) -> str:
    config = llama_config(vocab_size=vocab_size, max_position_embeddings=positions)
    return save_model(folder, tiny_model(config) if weights else config, tokenizer)


def _weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_fresh_model_has_the_shape_asked_for_and_the_corpus_vocabulary(corpus, tokenizer) -> None:
    config = fresh_model(SHAPE, corpus, 0).config
    assert config.vocab_size == len(tokenizer) == tokenizer_facts(corpus_tokenizer(corpus)).vocab_size
    assert config.max_position_embeddings == seq_len_of(corpus) == SEQ_LEN
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (32, 48, 1)
    assert (config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings) == (4, 2, True)
    assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id


def test_fresh_weights_are_a_pure_function_of_the_seed(corpus) -> None:
    torch.manual_seed(1)
    first = _weights(fresh_model(SHAPE, corpus, 5))
    torch.manual_seed(2)
    assert torch.equal(_weights(fresh_model(SHAPE, corpus, 5)), first)
    assert not torch.equal(_weights(fresh_model(SHAPE, corpus, 6)), first)


def test_a_fresh_model_leaves_the_global_random_numbers_alone(corpus) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fresh_model(SHAPE, corpus, 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_given_model_that_fits_is_known_by_its_absolute_path(corpus, tokenizer, tmp_path, monkeypatch) -> None:
    _given(tmp_path / "given", tokenizer)
    monkeypatch.chdir(tmp_path)
    path, facts = check_given_model("given", corpus, "teacher.path")
    assert path == facts.path == str(tmp_path / "given")
    assert (facts.padded_vocab_size, facts.max_positions) == (320, SEQ_LEN)
    assert facts.tokenizer == tokenizer_facts(tokenizer)


def test_a_model_without_its_weights_is_refused_by_its_setting(corpus, tokenizer, tmp_path) -> None:
    path = Path(_given(tmp_path, tokenizer))
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=rf"student\.path: {path}: no weights as safetensors; found no weights"):
        check_given_model(str(path), corpus, "student.path")


def test_a_folder_that_is_not_there_is_refused(corpus, tmp_path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/no: no model can be found"):
        check_given_model(str(tmp_path / "no"), corpus, "teacher.path")


def test_a_model_without_a_tokenizer_is_refused(corpus, tmp_path) -> None:
    save_model(tmp_path, tiny_llama())
    with pytest.raises(InputError, match=f"{tmp_path}: no tokenizer can be found"):
        check_given_model(str(tmp_path), corpus, "teacher.path")


def test_another_tokenizer_is_refused_with_the_first_entry_that_differs(corpus, tokenizer, tmp_path) -> None:
    other = tiny_tokenizer("quite another text: zebras quiz the jumping fox, ", 300)
    path = _given(tmp_path / "given", other)
    first = next(i for i in range(300) if tokenizer.convert_ids_to_tokens(i) != other.convert_ids_to_tokens(i))
    names = {tokenizer.convert_ids_to_tokens(first), other.convert_ids_to_tokens(first)}
    with pytest.raises(MismatchError, match=f"student.path: {path}: its tokenizer differs from that of the cor") as e:
        check_given_model(path, corpus, "student.path")
    assert any(f"found id of {name!r} = " in str(e.value) for name in names)


def test_a_model_that_ends_its_texts_otherwise_is_taken_and_the_corpus_decides(corpus, tmp_path, caplog) -> None:
    """An instruct model and its base model differ so."""
    other = tiny_tokenizer(vocab_size=300)
    other.eos_token, other.pad_token = "a", "b"
    with caplog.at_level("INFO", "capgap"):
        _, facts = check_given_model(_given(tmp_path, other), corpus, "student.path")
    assert facts.tokenizer.fingerprint == tokenizer_facts(corpus_tokenizer(corpus)).fingerprint
    said = "whose special tokens are used: eos_token is 'a', not '<|endoftext|>'; pad_token is 'b', not None"
    assert said in caplog.text


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(corpus, tokenizer, tmp_path) -> None:
    vocab_size = tokenizer_facts(tokenizer).vocab_size
    check_given_model(_given(tmp_path / "a", tokenizer, vocab_size=vocab_size), corpus, "teacher.path")
    with pytest.raises(MismatchError, match=f"found {vocab_size - 1} rows in its embedding, expected at least"):
        check_given_model(_given(tmp_path / "b", tokenizer, vocab_size=vocab_size - 1), corpus, "teacher.path")


def test_fewer_positions_than_a_sequence_has_are_refused(corpus, tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match=r"max_position_embeddings = 31, expected at least 32, the targets"):
        check_given_model(_given(tmp_path, tokenizer, positions=31), corpus, "teacher.path")


def test_a_model_without_a_bound_takes_any_sequence(corpus, tokenizer, tmp_path) -> None:
    save_model(tmp_path, tiny_model(mamba_config(vocab_size=320)), tokenizer)
    assert check_given_model(str(tmp_path), corpus, "student.path")[1].max_positions is None


def test_a_model_with_an_encoder_is_refused(corpus, tokenizer, tmp_path) -> None:
    """Transformers would open it as a language model, without its encoder and without a word."""
    BartConfig(vocab_size=320, d_model=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"student\.path: .*no causal language model; found an encoder beside the dec"):
        check_given_model(str(tmp_path), corpus, "student.path")
