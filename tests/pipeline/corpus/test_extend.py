"""New pieces: old ids keep their meaning, new ones are reached and can be undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from capgap.pipeline.corpus.extend import extend_tokenizer
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.schemas.errors import InputError

OLD = ["the quick brown fox jumps over the lazy dog, then the dog sleeps in the sun. "] * 20
NEW = ["zebras quiz jumping zebras; quizzical zebras, z\u00fcrich \u6587\u672c \u6587\u672c\n  zebras"] * 20


def byte_level() -> PreTrainedTokenizerBase:
    return train_tokenizer(OLD, 300)


def with_tokens_behind_its_vocabulary() -> PreTrainedTokenizerBase:
    """As Qwen's: special tokens have ids that the model of the tokenizer does not know of."""
    tokenizer = train_tokenizer(OLD, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def like_llamas() -> PreTrainedTokenizerBase:
    """Blanks are marked, there are no words, and what is no piece is spelt in bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(OLD, trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


KINDS = (byte_level, with_tokens_behind_its_vocabulary, like_llamas)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def pair(request, tmp_path_factory) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """A tokenizer as it lies in a folder, and what is made of it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param().save_pretrained(folder)
    old = load_tokenizer(folder)
    return old, extend_tokenizer(old, NEW, 24, 2)


def test_old_entries_keep_their_ids_and_new_ones_follow_without_a_gap(pair) -> None:
    old, new = (tokenizer.get_vocab() for tokenizer in pair)
    assert {piece: new[piece] for piece in old} == old
    assert sorted(new[piece] for piece in new.keys() - old.keys()) == list(range(max(old.values()) + 1, len(new)))
    assert 20 < len(new) - len(old) <= 24
    assert pair[0].special_tokens_map == pair[1].special_tokens_map
    assert pair[0].all_special_ids == pair[1].all_special_ids


def test_new_text_takes_fewer_tokens_and_comes_back_as_it_was(pair) -> None:
    old, new = pair
    assert len(_ids(new, NEW[0])) < 0.7 * len(_ids(old, NEW[0]))
    for text in (NEW[0], OLD[0], "neither of them: \u00e6\u4e2d\U0001f600 <|im_end|>x"):
        assert new.decode(_ids(new, text)) == old.decode(_ids(old, text))


def test_undone_merges_give_back_the_old_spelling(pair) -> None:
    """New pieces, each spelt by the old tokenizer, are what the old tokenizer makes of the whole text."""
    old, new = pair
    known = old.get_vocab()
    spelt: list[int] = []
    for piece in new.convert_ids_to_tokens(_ids(new, NEW[0])):
        ids = [known[piece]] if piece in known else [token.id for token in old.backend_tokenizer.model.tokenize(piece)]
        spelt += ids
    assert spelt == _ids(old, NEW[0])


def test_a_saved_one_is_read_again_as_it_is(pair, tmp_path: Path) -> None:
    pair[1].save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == pair[1].get_vocab()
    assert _ids(again, NEW[0] + OLD[0]) == _ids(pair[1], NEW[0] + OLD[0])


def test_the_commonest_pairs_become_pieces_and_every_one_is_reached() -> None:
    old = byte_level()
    new = extend_tokenizer(old, ["zyzyzyzy zyzy " * 10], 2, 2)
    assert set(new.get_vocab()) - set(old.get_vocab()) == {"zy", "zyzy"}
    assert new.convert_ids_to_tokens(_ids(new, "zyzyzy")) == ["zyzy", "zy"]
    # of pieces that stand less often than asked none is made
    assert extend_tokenizer(old, ["zyzy " * 3], 5, 7).get_vocab() == old.get_vocab()


def test_characters_that_a_tokenizer_spells_in_bytes_become_pieces_first() -> None:
    old = like_llamas()
    new = extend_tokenizer(old, ["\u6587\u672c " * 30], 3, 2)
    assert set(new.get_vocab()) - set(old.get_vocab()) >= {"\u6587", "\u672c"}
    assert not any(piece.startswith("<0x") for piece in set(new.get_vocab()) - set(old.get_vocab()))


def test_no_piece_reaches_across_a_blank_of_a_tokenizer_without_words() -> None:
    old = like_llamas()
    new = extend_tokenizer(old, ["of the of the " * 50], 30, 2)
    assert all("\u2581" not in piece.lstrip("\u2581") for piece in set(new.get_vocab()) - set(old.get_vocab()))


def test_a_chat_template_stays() -> None:
    old = byte_level()
    old.chat_template = "{{ messages }}"
    assert extend_tokenizer(old, NEW, 3, 2).chat_template == "{{ messages }}"


def test_another_kind_of_tokenizer_is_refused() -> None:
    words = BertTokenizerFast(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5})
    with pytest.raises(InputError, match=r"corpus\.tokenizer: .*cannot be extended; found a model of type WordPiece"):
        extend_tokenizer(words, NEW, 3, 2)
    inside = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    inside.decoder = decoders.BPEDecoder()
    with pytest.raises(InputError, match="pieces with a mark inside"):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inside), NEW, 3, 2)
