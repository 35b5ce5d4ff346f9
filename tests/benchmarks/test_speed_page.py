"""The tables of docs/speed.md are those of the kept figures."""

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
    assert "| 1,000 | 654 | 122 | Intel(R) Xeon(R) Processor |" in page
