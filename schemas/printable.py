"""Makes untrusted text safe to show on a terminal: it cannot move the cursor, hide words or reverse them."""

from __future__ import annotations

import re

from capgap.schemas.secrets import redacted

_PLACEHOLDER = "?"

# Whole escape sequences (CSI; OSC, DCS and similar ones up to their end; sequences of two characters), then single
# characters: controls except tab and line feed, line and paragraph separators, direction marks, surrogates and tags.
_UNPRINTABLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"
    "|\x1b[\\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"
    "|\x1b[ -/]*[0-~]"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    "|[\ud800-\udfff]|[\U000e0000-\U000e007f]"
)
_UNPRINTABLE_IN_A_NAME = re.compile("[\n\t]")


def printable(text: str) -> str:
    """Return the text with ? in place of each escape sequence and control character; line feeds and tabs stay."""
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub(_PLACEHOLDER, text)


def printable_name(text: str) -> str:
    """Return the text with ? in place of escape sequences, control characters, line feeds and tabs: one line."""
    return _UNPRINTABLE_IN_A_NAME.sub(_PLACEHOLDER, printable(text))


def fit_to_show(text: str) -> str:
    """Return the text with control characters and credentials replaced, ready to be printed or written."""
    return printable(redacted(text))
