"""The tables that scripts put into pages are those that they make now: of the product, and of kept figures."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sizes", "| 7B | 112.0 | 14.0 | 56.0 | 28.0 | 252.0 |"),
        ("speed", "| 1,000 | 654 | 122 | Intel(R) Xeon(R) Processor |"),
        ("rounds", "| arm | right, % | rounds - arm, points | teacher tokens | student tokens | seeds |"),
    ],
)
def test_the_tables_of_the_page_are_those_that_the_script_makes(
    monkeypatch: pytest.MonkeyPatch, name: str, row: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module(f"{name}_page")
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert script.filled(page) == page
    assert row in page
