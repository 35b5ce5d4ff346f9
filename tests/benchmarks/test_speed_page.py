"""The tables of docs/speed.md are what the product counts by."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_page_are_those_that_the_script_makes() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import speed_page
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "speed.md").read_text()
    assert speed_page.filled(page) == page
    assert "| 7B | 112.0 | 14.0 | 56.0 | 28.0 | 252.0 |" in page
