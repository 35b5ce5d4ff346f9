"""A term of the field stands in a link where a page first uses it, to the glossary or to the page that explains it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "concepts.md"
TERMS = {
    "acceptance": "acceptance",
    "alpha": "alpha",
    "arm": "arms?",
    "capacity gap": "capacity gap",
    "context rule": "context rules?",
    "ECE": "ECE",
    "ghost": "ghost",
    "identity": "identit(?:y|ies)",
    "KL": "KL",
    "lease": "leases?",
    "recording": "recordings?",
    "tail": "tails?",
}
# pages whose own text says what the term means, where it first stands or in the sentence after it
EXPLAINED = {
    ("README.md", "KL"),
    ("README.md", "acceptance"),
    ("docs/evaluation.md", "ECE"),
    ("docs/evaluation.md", "KL"),
    ("docs/evaluation.md", "acceptance"),
    ("docs/explanation/context.md", "context rule"),
    ("docs/format.md", "tail"),
    ("docs/quickstart.md", "arm"),
}


def _uses() -> Iterator[Any]:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        name, text = str(page.relative_to(ROOT)), prose(page.read_text())
        for term, pattern in TERMS.items():
            found = re.search(rf"(?<![\w.-])(?:{pattern})(?![\w-])", text)
            if found is not None and page != GLOSSARY and (name, term) not in EXPLAINED:
                yield pytest.param(text, found.start(), id=f"{name}-{term}")


def prose(page: str) -> str:
    """A page with blanks for its code, its headings and the tables that scripts make."""
    for pattern in (r"(?s:^( *)```.*?^\1```$)", r"(?s:<!-- made by .*?<!-- end -->)", r"`[^`\n]+`", r"^#.*$"):
        page = re.sub(pattern, lambda found: " " * len(found[0]), page, flags=re.MULTILINE)
    return page


@pytest.mark.parametrize(("text", "place"), _uses())
def test_the_first_use_is_a_link(text: str, place: int) -> None:
    links = [found.span(1) for found in re.finditer(r"\[([^\]]*)\]\([^)]+\)", text)]
    line = text[text.rfind("\n", 0, place) + 1 :].partition("\n")[0]
    assert any(first <= place < last for first, last in links), line


def test_the_glossary_has_every_term() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", GLOSSARY.read_text().partition("## Glossary")[2], re.MULTILINE)
    known = {word.strip() for row in rows for word in row.split(",")}
    assert set(TERMS) <= known
