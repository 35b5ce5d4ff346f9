"""Counts as people write them: 3B, 350M, 126B."""

from __future__ import annotations

import re

from capgap.schemas.errors import SettingError

_LETTERS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kKMBTbt]?)")


def parse_count(text: str, where: str) -> int:
    """Parameters or tokens: a number, and k, M, B or T for thousands, millions, 10^9 or 10^12.

    Raises:
        SettingError: the text is no such count, or less than 1.
    """
    match = _COUNT.fullmatch(text.strip())
    letter = match.group(2) if match else ""
    letter = "k" if letter in ("k", "K") else letter.upper()
    value = round(float(match.group(1)) * _LETTERS[letter]) if match else 0
    if value < 1:
        raise SettingError(
            "not a count", where=where, found=text, expected="a number such as 350M, 3B, 126B or 1.5e9, at least 1"
        )
    return value


def parse_counts(text: str, where: str) -> tuple[int, ...]:
    """Several counts, separated by commas."""
    return tuple(parse_count(part, where) for part in text.split(","))
