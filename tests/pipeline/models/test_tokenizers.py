from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.corpus.tokenizer import END_OF_TEXT, train_tokenizer
from capgap.pipeline.models.tokenizers import load_tokenizer, require_same_tokenizer, tokenizer_facts
from capgap.schemas.errors import InputError, MismatchError

VOCABULARY = {"<eos>": 0, "<pad>": 1, "the": 2, "cat": 3, "sat": 4, "mat": 5}
Words = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def words() -> Words:
    """A tokenizer of whole words."""

    def make(vocabulary: dict[str, int] = VOCABULARY, **special: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<eos>"} | special))

    return make


def test_the_same_tokenizer_passes(words: Words) -> None:
    require_same_tokenizer(words(), "the corpus", words(), "the teacher")
    reordered = dict(reversed(VOCABULARY.items()))
    require_same_tokenizer(words(), "the corpus", words(reordered), "the teacher")
    assert tokenizer_facts(words()) == tokenizer_facts(words(reordered))


def test_a_tokenizer_passes_after_it_was_saved_and_loaded(words: Words, tmp_path: Path) -> None:
    for tokenizer in (words(), train_tokenizer(["some text to learn from"] * 3, 300)):
        tokenizer.save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path)
        require_same_tokenizer(tokenizer, "the corpus", loaded, "the teacher")
        assert tokenizer_facts(loaded) == tokenizer_facts(tokenizer)


@pytest.mark.parametrize(
    ("vocabulary", "found"),
    [
        ({**VOCABULARY, "cat": 4, "sat": 3}, "id of 'cat' = 4, expected 3"),
        ({**VOCABULARY, "mat": 9}, "id of 'mat' = 9, expected 5"),
        ({**VOCABULARY, "new": 6}, "id of 'new' = 6, expected none"),
        ({n: i for n, i in VOCABULARY.items() if n != "sat"}, "id of 'sat' = none, expected 4"),
        ({"<eos>": 0, "<pad>": 1, "dog": 2, "cat": 3, "sat": 4, "mat": 5}, "id of 'dog' = 2, expected none"),
        ({**VOCABULARY, "mat": 4, "sat": 5, "the": 3, "cat": 2}, "id of 'the' = 3, expected 2"),
    ],
    ids=["swapped", "moved", "added", "missing", "replaced", "several"],
)
def test_the_first_differing_entry_is_named(words: Words, vocabulary: dict[str, int], found: str) -> None:
    with pytest.raises(MismatchError) as caught:
        require_same_tokenizer(words(), "the corpus", words(vocabulary), "teacher.path: there")
    assert str(caught.value).startswith(
        f"teacher.path: there: its tokenizer differs from that of the corpus; found {found}; use models of one"
    )
    assert tokenizer_facts(words()).fingerprint != tokenizer_facts(words(vocabulary)).fingerprint


@pytest.mark.parametrize(
    ("special", "found"),
    [
        ({"eos_token": "<pad>"}, "special token eos_token = '<pad>', expected '<eos>'"),
        ({"pad_token": "<pad>"}, "special token pad_token = '<pad>', expected none"),
        ({"bos_token": "<eos>"}, "special token bos_token = '<eos>', expected none"),
    ],
)
def test_a_special_token_that_differs_is_named(words: Words, special: dict[str, str], found: str) -> None:
    with pytest.raises(MismatchError, match=f"found {found}"):
        require_same_tokenizer(words(), "the corpus", words(**special), "the teacher")
    assert tokenizer_facts(words()).fingerprint != tokenizer_facts(words(**special)).fingerprint


def test_the_real_vocabulary_ends_with_the_highest_id(words: Words) -> None:
    assert tokenizer_facts(words()).vocab_size == 6
    # ids 6 to 8 name nothing, but a model must have a row for each of them
    assert tokenizer_facts(words({**VOCABULARY, "far": 9})).vocab_size == 10


def test_added_tokens_count(words: Words) -> None:
    larger = words()
    larger.add_tokens(["added"])
    assert tokenizer_facts(larger).vocab_size == 7
    with pytest.raises(MismatchError, match="id of 'added' = 6, expected none"):
        require_same_tokenizer(words(), "the corpus", larger, "the teacher")


def test_a_tokenizer_without_an_end_token_is_refused(words: Words) -> None:
    with pytest.raises(InputError, match=r"the tokenizer has no end-of-sequence token; expected one.*set eos_token in"):
        tokenizer_facts(words(eos_token=None))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: no tokenizer can be found; found .*, expected a Hugging Face"):
        load_tokenizer(tmp_path)


def test_a_trained_tokenizer_says_any_text_and_ends_documents_with_its_own_token() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 10, 300)
    facts = tokenizer_facts(tokenizer)
    assert facts.vocab_size <= 300
    assert tokenizer.convert_ids_to_tokens(facts.eos_id) == END_OF_TEXT
    for text in ("the cat", "\u00fc\u4e2d\U0001f600", "\x00\t\r\n", " leading and trailing "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert facts.eos_id not in ids
        assert tokenizer.decode(ids) == text
