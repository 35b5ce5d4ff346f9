"""Bound the growth of text in a tokenizer by its description, before any text goes through it.

A given model's normaliser is a list of steps that a stranger wrote: forty steps that each double a letter make a
terabyte of one letter. The kind of a step gives the most characters that it can make of one, so a tokenizer that grows
too much is refused before it runs, whatever the text.
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

# U+FDFA becomes eighteen characters, and no character becomes more
_UNICODE_TABLES = 18
_BYTES_OF_CHARACTER = 4
_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def require_bounded(description: dict[str, Any], where: str) -> None:
    """Raise InputError where a tokenizer can make a text too long.

    Args:
        description: content of its tokenizer.json; missing parts change nothing.
        where: name of the tokenizer in errors.
    """
    for part in _PARTS:
        growth = _growth(description.get(part))
        if growth > MAX_GROWTH:
            raise InputError(
                f"the {part} of the tokenizer can make a text too long",
                where=where,
                found=f"up to {growth:.3g} characters for each character",
                expected=f"at most {MAX_GROWTH}",
                fix="use another tokenizer",
            )


def require_bounded_file(folder: Path) -> None:
    """Raise InputError where a folder's tokenizer.json describes a tokenizer that can make a text too long.

    It must be called before the tokenizer is loaded, as loading already normalises the file's added tokens. A file that
    cannot be read is not refused here.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        found = file.stat()
        require_bounded(_parts_in(file, found.st_size, found.st_mtime_ns), str(folder))


def require_bounded_tokenizer(tokenizer: Any, where: str) -> None:
    """Raise InputError where a loaded tokenizer, which may differ from its folder's file, can make a text too long."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {name: getattr(backend, name, None) for name in _PARTS}
    require_bounded({name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}, where)


@lru_cache
def _parts_in(file: Path, num_bytes: int, modified_ns: int) -> dict[str, Any]:
    """Read the parts of a file, and keep them: the file may hold a quarter of a million tokens."""
    try:
        description = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError):
        return {}
    return {name: description.get(name) for name in _PARTS} if isinstance(description, dict) else {}


def _growth(part: object) -> float:
    """Return the product of the growth of all steps; Unicode's tables change nothing twice, so they are one step."""
    steps = list(_steps(part))
    usual = any(step.get("type") in ("NFD", "NFKD", "NFC", "NFKC", "Lowercase") for step in steps)
    return math.prod([_UNICODE_TABLES if usual else 1, *(_growth_of_step(step) for step in steps)])


def _steps(part: object) -> Iterator[dict[str, Any]]:
    """Yield every step, also of nested sequences of any depth."""
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
            # a regular expression may match the empty text before each character
            return 1.0 + len(content)
        case "ByteLevel":
            return _BYTES_OF_CHARACTER
        case "BertNormalizer":
            return 3.0
        case "Precompiled":
            return _longest_of_map(step.get("precompiled_charsmap"))
    return 1.0


def _longest_of_map(value: object) -> float:
    """Return the length of the longest replacement in SentencePiece's table.

    The table holds the length of a trie, the trie, and then the replacements, each with a zero byte after it.
    """
    try:
        data = base64.b64decode(str(value))
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    except ValueError:
        return 1.0
    return float(max([1, *(len(text.decode("utf-8", "replace")) for text in texts)]))
