"""What docs/troubleshooting.md explains is what the code says, word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SAID = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def code() -> str:
    """The whole program's text, with what is joined over lines joined."""
    files = (path for layer in ("jobs", "schemas", "pipeline") for path in sorted((ROOT / layer).rglob("*.py")))
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_the_page_has_the_common_messages_each_once() -> None:
    assert len(SAID) == len(set(SAID)) > 40
    assert SAID.count("no such setting") == 1


@pytest.mark.parametrize("words", SAID)
def test_a_message_of_the_page_is_one_of_the_code(words: str, code: str) -> None:
    parts = [re.escape(part) for part in words.replace("the loss is", "the ... is").split("...")]
    # dots stand for what is put in; a question is put together elsewhere
    pattern = r"\{[^\n]*?\}".join(parts[:1] if "did you mean" in words else parts)
    pattern = re.sub(r";\\ did\\ you\\ mean.*", "", pattern)
    assert re.search(pattern, code), words
