"""Text of a stranger's as a terminal may show it: nothing in it moves the cursor, hides a word or turns it around."""

from __future__ import annotations

import re

from capgap.schemas.secrets import redacted

_PLACEHOLDER = "?"

# escape sequences as a whole (CSI; OSC, DCS and their like up to their end; two characters), then single characters:
# controls but for tab and line feed, line and paragraph separators, marks of direction, halves of a pair, tags
_UNPRINTABLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"
    "|\x1b[\\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"
    "|\x1b[ -/]*[0-~]"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    "|[\ud800-\udfff]|[\U000e0000-\U000e007f]"
)
_UNPRINTABLE_IN_A_NAME = re.compile("[\n\t]")


def printable(text: str) -> str:
    """The text with ? for each escape sequence and control character; lines and tabs stay."""
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub(_PLACEHOLDER, text)


def printable_name(text: str) -> str:
    """As `printable`, on one line."""
    return _UNPRINTABLE_IN_A_NAME.sub(_PLACEHOLDER, printable(text))


def fit_to_show(text: str) -> str:
    """As it may leave: printable, and without credentials."""
    return printable(redacted(text))
