"""Reads counts as people write them, such as 3B, 350M or 126B."""

from __future__ import annotations

import re

from capgap.schemas.errors import SettingError

_LETTERS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# the largest signed 64-bit integer, as counts in files are stored
_MOST = 2**63 - 1
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)([kKMBTbt]?)")


def parse_count(text: str, where: str) -> int:
    """Parse a number of parameters or tokens: a number, with k, M, B or T for 10^3, 10^6, 10^9 or 10^12.

    Args:
        text: The text to parse.
        where: Name of the setting, for the error.

    Raises:
        SettingError: The text is not such a count, or it is less than 1 or more than 2^63 - 1.
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
    """Parse several counts that are separated by commas.

    Raises:
        SettingError: One of them is not a count.
    """
    return tuple(parse_count(part, where) for part in text.split(","))
