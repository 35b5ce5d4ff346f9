"""Counts as people write them: 3B, 350M, 126B."""

from __future__ import annotations

import re

from capgap.schemas.errors import SettingError

_LETTERS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# what a 64-bit integer holds, as in every file that a count could come from or go to
_MOST = 2**63 - 1
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kKMBTbt]?)")


def parse_count(text: str, where: str) -> int:
    """Parameters or tokens: a number, and k, M, B or T for thousands, millions, 10^9 or 10^12.

    Raises:
        SettingError: the text is no such count, less than 1, or more than 2^63 - 1.
    """
    match = _COUNT.fullmatch(text.strip())
    letter = match.group(2) if match else ""
    letter = "k" if letter in ("k", "K") else letter.upper()
    value = round(float(match.group(1)) * _LETTERS[letter]) if match else 0
    if not 1 <= value <= _MOST:
        raise SettingError(
            "not a count",
            where=where,
            found=text,
            expected="a number such as 350M, 3B, 126B or 1.5e9, from 1 to 2^63 - 1",
        )
    return value


def parse_counts(text: str, where: str) -> tuple[int, ...]:
    """Several counts, separated by commas."""
    return tuple(parse_count(part, where) for part in text.split(","))
