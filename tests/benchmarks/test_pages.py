"""The tables that scripts put into pages are those that they make now: of the product, and of kept figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sizes", "| 7B | 112.0 | 14.0 | 56.0 | 28.0 | 252.0 |"),
        ("speed", "| 1,000 | 654 | 122 | Intel(R) Xeon(R) Processor |"),
        ("rounds", "| arm | right, % | rounds - arm, points | teacher tokens | student tokens | seeds |"),
        ("low_bit", "| PTQ |  | 30.03 | 0.4086 | 0.0 | 0.0 |"),
    ],
)
def test_the_tables_of_the_page_are_those_that_the_script_makes(
    monkeypatch: pytest.MonkeyPatch, name: str, row: str
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module(f"{name}_page")
    page = script.PAGE.read_text()
    assert script.filled(page) == page
    assert row in page


def test_readme_s_table_and_picture_are_made_of_the_lines_that_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality_page = importlib.import_module("quality_page")
    page = (ROOT / "README.md").read_text()
    assert "docs/quality.svg" in page and quality_page.filled(page, ROOT / "benchmarks/results") == page
    said = ElementTree.fromstring((ROOT / "docs/quality.svg").read_text()).attrib["aria-label"]
    lines = quality_page.kept(ROOT / "benchmarks/results", "smol")
    share = 100 * fmean(quality_page.shares(lines, "sampled, n = 50, systematic", quality_page.kl_of))
    assert f"sampled, n = 50, systematic: {share:.0f} % at 30 bytes" in said


def test_a_new_measurement_takes_the_place_of_an_older_one_when_it_has_as_many_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    quality_page = importlib.import_module("quality_page")

    def kept(*abouts: str) -> list[str]:
        (tmp_path / "quality-demo.jsonl").write_text(
            "".join(json.dumps({"about": {"text": one}}) + "\n" for one in abouts)
        )
        return [line["about"]["text"] for line in quality_page.kept(tmp_path, "demo")]

    assert kept("old", "old", "new") == ["old", "old"]
    assert kept("old", "new", "old", "new") == ["new", "new"]
    assert kept() == []
