from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GemmaConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from capgap.pipeline.corpus.tokenizer import END_OF_TEXT, train_tokenizer
from capgap.pipeline.models.tokenizer_files import PROBES
from capgap.pipeline.models.tokenizers import chat_template_of, load_tokenizer, require_same_tokenizer, tokenizer_facts
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


def test_a_byte_order_mark_is_no_part_of_a_tokenizers_template(tmp_path: Path) -> None:
    train_tokenizer(["some text to learn from"] * 3, 300).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    assert load_tokenizer(tmp_path).chat_template == chat_template_of(tmp_path) == "{{ messages[0].content }}"


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
    ("special", "said"),
    [
        ({"eos_token": "<pad>"}, "eos_token is '<pad>', not '<eos>'"),
        ({"pad_token": "<pad>"}, "pad_token is '<pad>', not None"),
        ({"bos_token": "<eos>"}, "bos_token is '<eos>', not None"),
        ({"unk_token": "<pad>"}, "unk_token is '<pad>', not None"),
    ],
)
def test_a_special_token_that_is_only_called_otherwise_is_said_and_no_error(
    words: Words, special: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "capgap"):
        require_same_tokenizer(words(), "the corpus", words(**special), "student.path: there")
    assert f"student.path: there: the ids are those of the corpus, whose special tokens are used: {said}" in caplog.text
    assert tokenizer_facts(words()).fingerprint == tokenizer_facts(words(**special)).fingerprint


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
    with pytest.raises(InputError, match=r"the tokenizer has no end-of-sequence token; expected an.*set eos_token in"):
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


# What of a tokenizer.json decides ids, and what does not.


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-level")
    text = "the cat sat on the mat, and it's 12 o'clock; the other cats sat there too\n"
    train_tokenizer([text] * 10, 320).save_pretrained(folder)
    return folder


def _with(folder: Path, target: Path, change: Callable[[dict[str, Any]], object], **config: Any) -> Path:
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text())
    change(content)
    (target / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return target


def _swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


BEGIN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [0], "tokens": [END_OF_TEXT]}},
}
SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_swap_merges, "found merge 3 = ["),
        (lambda content: content["model"].update(ignore_merges=True), "found model.ignore_merges = True, expected F"),
        (lambda content: content.update(normalizer={"type": "NFC"}), "found normaliser = {'type': 'NFC'}, expected n"),
        (lambda content: content.update(pre_tokenizer=SPLIT), "found pre-tokenizer = "),
        (lambda content: content.update(post_processor=BEGIN), r"found post-processor = [[0], []], expected [[], []]"),
    ],
    ids=["merges", "model", "normaliser", "pre-tokenizer", "post-processor"],
)
def test_whatever_decides_ids_is_in_the_fingerprint_and_is_named(
    byte_level: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], found: str
) -> None:
    own, other = load_tokenizer(byte_level), load_tokenizer(_with(byte_level, tmp_path / "other", change))
    assert tokenizer_facts(own).fingerprint != tokenizer_facts(other).fingerprint
    with pytest.raises(MismatchError, match=re.escape(found)):
        require_same_tokenizer(own, "the corpus", other, "the teacher")


OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda content: content.update(post_processor=OFFSETS), {}),
        (lambda content: content.update(truncation=TRUNCATION), {}),
        (lambda content: content["added_tokens"][0].update(special=True), {}),
        (lambda content: None, {"pad_token": "a", "model_max_length": 12, "chat_template": "{{ messages }}"}),
    ],
    ids=["offsets", "truncation", "special", "names"],
)
def test_what_decides_no_id_is_not_in_the_fingerprint(
    byte_level: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], config: dict[str, Any]
) -> None:
    own, other = load_tokenizer(byte_level), load_tokenizer(_with(byte_level, tmp_path / "other", change, **config))
    assert tokenizer_facts(own).fingerprint == tokenizer_facts(other).fingerprint
    require_same_tokenizer(own, "the corpus", other, "the teacher")


CLASSES = {
    "LlamaTokenizerFast": LlamaConfig,
    "LlamaTokenizer": LlamaConfig,
    "Qwen2Tokenizer": Qwen2Config,
    "GPT2Tokenizer": GPT2Config,
    "GemmaTokenizer": GemmaConfig,
    "PreTrainedTokenizerFast": Qwen2Config,
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_ids_are_those_of_the_file_whatever_class_is_named(byte_level: Path, tmp_path: Path, name: str) -> None:
    folder = _with(byte_level, tmp_path / "declared", lambda content: None, tokenizer_class=name)
    CLASSES[name]().save_pretrained(folder)
    tokenizer, reference = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*PROBES, "the cat sat on  the mat\n\n 2024 it's"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    require_same_tokenizer(load_tokenizer(byte_level), "the corpus", tokenizer, "the teacher")
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_facts(load_tokenizer(tmp_path / "again")) == tokenizer_facts(tokenizer)


def test_a_class_that_changes_ids_is_said(byte_level: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_tokenizer(_with(byte_level, tmp_path / "llama", lambda content: None, tokenizer_class="LlamaTokenizerFast"))
    assert "transformers' LlamaTokenizer gives other ids than tokenizer.json does, for 'Hello world" in caplog.text


def test_a_byte_level_tokenizer_that_loses_text_is_refused(byte_level: Path, tmp_path: Path) -> None:
    folder = _with(byte_level, tmp_path / "lost", lambda content: content.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(InputError, match="a byte-level tokenizer does not decode ids to their text; found 'Hello"):
        load_tokenizer(folder)


def test_a_pointer_in_the_place_of_the_tokenizer_is_named(byte_level: Path, tmp_path: Path) -> None:
    folder = _with(byte_level, tmp_path / "pointer", lambda content: None)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n")
    with pytest.raises(InputError, match=r"found a Git LFS pointer in the place of tokenizer\.json"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_file_is_refused(byte_level: Path, tmp_path: Path) -> None:
    folder = _with(byte_level, tmp_path / "damaged", lambda content: content["model"].update(type="none"))
    with pytest.raises(InputError, match=r"damaged: tokenizer\.json cannot be read; found data did not match"):
        load_tokenizer(folder)


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """A folder with a tokenizer.model of SentencePiece, and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path / "pieces"
    folder.mkdir()
    words = ["the cat sat on the mat, and 12 dogs saw it; na\u00efve caf\u00e9s were there too"] * 50
    (tmp_path / "text.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.vocab").unlink()
    LlamaConfig(vocab_size=320).save_pretrained(folder)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_pieces_alone_are_read_as_their_own_library_reads_them(pieces: Path) -> None:
    import sentencepiece

    tokenizer, reference = load_tokenizer(pieces), sentencepiece.SentencePieceProcessor(str(pieces / "tokenizer.model"))
    for text in ("the cat sat on the mat", "12 dogs; na\u00efve \u4f60\u597d", "two  blanks\n and a line"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text) and tokenizer.decode(ids) == text


def test_a_missing_reader_of_pieces_is_named(pieces: Path) -> None:
    """In a process of its own, in which the package cannot be found."""
    code = (
        "import sys, importlib.util as util; own = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'sentencepiece' else own(name, package)\n"
        "sys.modules['sentencepiece'] = None\n"
        "from capgap.pipeline.models.tokenizers import load_tokenizer\n"
        f"load_tokenizer({str(pieces)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MachineError" in done.stderr and "run `pip install sentencepiece`" in done.stderr
