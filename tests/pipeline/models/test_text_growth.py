from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.text_growth import MAX_GROWTH, require_bounded, require_bounded_tokenizer
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.schemas.errors import InputError


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


DOUBLE = _replace({"String": "a"}, "aa")
LONG = base64.b64encode((4).to_bytes(4, "little") + b"trie" + b"a\0" + b"x" * 500 + b"\0").decode()


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


@pytest.mark.parametrize(
    "part",
    [
        _sequence(*[DOUBLE] * 40),
        _sequence(_sequence(*[DOUBLE] * 20), _sequence(*[DOUBLE] * 20)),
        _replace({"String": " "}, "x" * 1000),
        _replace({"Regex": ""}, "x" * 1000),
        _sequence(*[_replace({"Regex": "."}, "xy")] * 9),
        _sequence(*[{"type": "ByteLevel"}] * 10),
        {"type": "Precompiled", "precompiled_charsmap": LONG},
    ],
)
@pytest.mark.parametrize("name", ["normalizer", "decoder"])
def test_what_explodes_is_refused_by_name(part: dict[str, Any], name: str) -> None:
    with pytest.raises(
        InputError, match=rf"it: the {name} of the tokenizer can make a text too long; found up to .* ch"
    ):
        require_bounded({name: part}, "it")


@pytest.mark.parametrize(
    "part",
    [
        None,
        _sequence({"type": "Prepend", "prepend": "\u2581"}, _replace({"String": " "}, "\u2581")),
        _sequence({"type": "NFC"}, _replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}),
        _sequence(_replace({"String": "``"}, '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}),
        {"type": "BertNormalizer"},
    ],
)
def test_what_tokenizers_do_is_not(part: dict[str, Any] | None) -> None:
    require_bounded(
        {"normalizer": part, "pre_tokenizer": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"}}, "it"
    )


def test_no_character_becomes_more_by_unicode_than_is_counted_for_it() -> None:
    characters = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert max(len(unicodedata.normalize("NFKD", c).lower()) for c in characters) == 18


def test_a_folder_that_explodes_is_refused_before_it_is_read_and_one_in_memory_too(tmp_path: Path) -> None:
    train_tokenizer(["a b c"], 300).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    description = json.loads(file.read_bytes()) | {"normalizer": _sequence(*[DOUBLE] * 40)}
    # goes through the normaliser where it is added
    description["added_tokens"].append(
        {**description["added_tokens"][0], "id": 300, "content": "aa", "normalized": True}
    )
    file.write_text(json.dumps(description))
    with pytest.raises(InputError, match=f"{tmp_path}: the normalizer .*, expected at most {MAX_GROWTH}"):
        load_tokenizer(tmp_path)
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 40)
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(InputError, match="made here: the normalizer"):
        require_bounded_tokenizer(PreTrainedTokenizerFast(tokenizer_object=made), "made here")
