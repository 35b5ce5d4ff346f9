"""Rows for new pieces: old ones to the bit as they were, new ones the mean of what they are spelt with."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from capgap.pipeline.corpus.extend import extend_tokenizer
from capgap.pipeline.teacher.vocabulary import extend_vocabulary


@pytest.fixture(scope="module")
def tokenizers() -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    old = tiny_tokenizer()
    return old, extend_tokenizer(old, ["zebras quiz zebras "] * 20, 12, 2)


def _model(num_rows: int, tied: bool) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=num_rows, hidden_size=16, intermediate_size=16, tie_word_embeddings=tied).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 5, 64])
def test_new_rows_are_the_mean_of_the_old_pieces_and_old_ones_stay(tokenizers, tied: bool, padding: int) -> None:
    """With rows of padding some or all new pieces have a row already, which means nothing."""
    old, new = tokenizers
    model = _model(len(old) + padding, tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert extend_vocabulary(model, old, new) == len(new) - len(old) == 9
    rows = max(len(new), len(old) + padding)
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (ends[0] is ends[1]) == tied
    assert model.config.vocab_size == rows and all(end.shape == (rows, 16) for end in ends)
    for end, name in zip(ends, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        assert torch.equal(end[: len(old)], before[name][: len(old)])
        for piece in set(new.get_vocab()) - set(old.get_vocab()):
            pieces = [token.id for token in old.backend_tokenizer.model.tokenize(piece)]
            assert len(pieces) > 1
            assert torch.equal(end[new.get_vocab()[piece]], before[name][pieces].mean(dim=0))
    others = before.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in others)


def test_text_of_old_pieces_is_scored_as_before(tokenizers) -> None:
    old, new = tokenizers
    model = _model(len(old), False)
    ids = torch.tensor([[3, 9, 200, 17]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        extend_vocabulary(model, old, new)
        after = model(input_ids=ids).logits[..., : len(old)]
    # a product of another width may be summed in another order
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_rows_are_filled_up_only_where_that_is_asked(tokenizers) -> None:
    old, new = tokenizers
    asked = _model(len(old), True)
    extend_vocabulary(asked, old, new, pad_to_multiple_of=64)
    rows = asked.get_input_embeddings().weight
    assert len(rows) % 64 == 0 and len(rows) - len(new) < 64
    assert torch.equal(rows[-1], rows[: len(old)].mean(dim=0)) and len(rows) > len(new)
    aligned = _model(320, True)
    extend_vocabulary(aligned, old, new, pad_to_multiple_of=64)
    assert aligned.config.vocab_size == 320, "rows that are a multiple already are left alone"


def test_a_tokenizer_as_it_was_changes_nothing(tokenizers) -> None:
    old, _ = tokenizers
    model = _model(len(old) + 3, True)
    before = model.get_input_embeddings().weight.clone()
    assert extend_vocabulary(model, old, old) == 0
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_token_that_stands_in_text_as_it_is_takes_the_spelling_of_its_letters(tokenizers) -> None:
    old, _ = tokenizers
    new = tiny_tokenizer()
    new.add_tokens([" <note>"])
    model = _model(len(old), True)
    before = model.get_input_embeddings().weight.clone()
    assert extend_vocabulary(model, old, new) == 1
    ids = old(" <note>", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    torch.testing.assert_close(model.get_input_embeddings().weight[-1], before[ids].mean(dim=0))
