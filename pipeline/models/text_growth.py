"""How much text a tokenizer may make of a character, which its description says before any text goes through it.

A normaliser is a stranger's list of steps: forty that each write a letter twice make a terabyte of one. What each step
can make at most of one character is known from its kind, so the whole is refused before it runs, whatever the text.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from capgap.schemas.errors import InputError

MAX_GROWTH = 64
"""Characters that one character of text may become; Unicode's own tables count once, however often they are used."""

# U+FDFA becomes eighteen characters, and no other more
_UNICODE_TABLES = 18
_BYTES_OF_CHARACTER = 4
_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def require_bounded(description: dict[str, Any], where: str) -> None:
    """Raise InputError where a tokenizer can make too much of a text.

    Args:
        description: what its tokenizer.json says; parts that are missing do nothing.
        where: the tokenizer as the user knows it.
    """
    for part in _PARTS:
        growth = _growth(description.get(part))
        if growth > MAX_GROWTH:
            raise InputError(
                f"the {part} of the tokenizer makes too much of a text",
                where=where,
                found=f"up to {growth:.3g} characters for each",
                expected=f"at most {MAX_GROWTH}",
                fix="use another tokenizer",
            )


def require_bounded_file(folder: Path) -> None:
    """`require_bounded` of a folder's tokenizer.json, before anything reads it; one that cannot be read is left alone.

    What a file adds as whole tokens goes through its normaliser when it is loaded.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        found = file.stat()
        require_bounded(_parts_in(file, found.st_size, found.st_mtime_ns), str(folder))


def require_bounded_tokenizer(tokenizer: Any, where: str) -> None:
    """`require_bounded` of a tokenizer that was loaded from wherever, for it may not be what its folder says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {name: getattr(backend, name, None) for name in _PARTS}
    require_bounded({name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}, where)


@lru_cache
def _parts_in(file: Path, num_bytes: int, modified_ns: int) -> dict[str, Any]:
    """The parts of a file, read once: it may hold a quarter of a million tokens."""
    try:
        description = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError):
        return {}
    return {name: description.get(name) for name in _PARTS} if isinstance(description, dict) else {}


def _growth(part: object) -> float:
    """The product of what its steps may make; the tables of Unicode, which change nothing twice, are one step."""
    steps = list(_steps(part))
    usual = any(step.get("type") in ("NFD", "NFKD", "NFC", "NFKC", "Lowercase") for step in steps)
    return math.prod([_UNICODE_TABLES if usual else 1, *(_growth_of_step(step) for step in steps)])


def _steps(part: object) -> Iterator[dict[str, Any]]:
    """Every step, those of sequences within sequences too, however deep."""
    left = [part]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            yield one
            left += [one.get(name) for name in ("normalizers", "pretokenizers", "decoders")]


def _growth_of_step(step: dict[str, Any]) -> float:
    match step.get("type"):
        case "Replace":
            content, pattern = str(step.get("content", "")), step.get("pattern")
            text = pattern.get("String") if isinstance(pattern, dict) else None
            if isinstance(text, str) and text:
                return max(1.0, len(content) / len(text))
            # an expression may match nothing, before each character
            return 1.0 + len(content)
        case "ByteLevel":
            return _BYTES_OF_CHARACTER
        case "BertNormalizer":
            return 3.0
        case "Precompiled":
            return _longest_of_map(step.get("precompiled_charsmap"))
    return 1.0


def _longest_of_map(value: object) -> float:
    """SentencePiece's table: the length of a trie, the trie, and behind it what is written, a zero after each."""
    try:
        data = base64.b64decode(str(value))
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    except ValueError:
        return 1.0
    return float(max([1, *(len(text.decode("utf-8", "replace")) for text in texts)]))
