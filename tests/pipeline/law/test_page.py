"""The page of a fit: whole, escaped, nothing from elsewhere, every chart with its numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from law_tables import planted, run, size, teacher, valley

from capgap.pipeline.law.fit import fit_table
from capgap.pipeline.law.page import render_page
from capgap.pipeline.law.table import write_table
from capgap.schemas.law import LawRun


class Page(HTMLParser):
    """Ids, tables and charts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.num_charts = self.num_tables = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_charts += tag == "svg"
        self.num_tables += tag == "table"
        self.ids += [value for name, value in attrs if name == "id" and value]


def page_of(tmp_path: Path, runs: Sequence[LawRun]) -> str:
    write_table(tmp_path / "runs.jsonl", runs)
    return render_page(fit_table(tmp_path / "runs.jsonl"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    runs = planted(valley(4.0), [100e6, 200e6, 400e6], np.geomspace(1, 32, 6).tolist())
    lost = next(i for i, one in enumerate(runs) if one.teacher is not None and one.seed == 2)
    return page_of(tmp_path_factory.mktemp("law"), runs[:lost] + runs[lost + 1 :])


def test_every_chart_has_its_numbers(text: str) -> None:
    page = Page(text)
    assert page.num_charts == 3 * 2 + 1 + 3, "two a student, the law, three accountings"
    # and a table of forms for each student, the verdicts, and the regrets
    assert page.num_tables == page.num_charts + 3 + 2


def test_one_student_is_no_chart_over_students(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path, planted(valley(4.0), [100e6], np.geomspace(1, 32, 6).tolist())))
    assert page.num_charts == 2 + 3, "its two axes, three accountings"


def test_ids_are_unique_and_nothing_is_loaded_from_elsewhere(text: str) -> None:
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "<script" not in text


def test_verdicts_laws_and_missing_runs_stand_on_the_page(text: str) -> None:
    assert "interior" in text
    assert "best teacher = 4" in text or "best teacher = 3.9" in text
    assert "Runs without a result, which no mean includes (1)" in text
    assert "seed 2: no row in the table" in text
    assert "2311.07052" in text and "2502.08606" in text
    assert "6 N_S D + 2 N_T D_C" in text
    assert "sampled of 50, temperature 1" in text


def test_a_published_law_within_reach_of_the_teachers_is_drawn(text: str) -> None:
    assert text.count(">law of capacity gap<") >= 3


def test_a_curve_that_could_not_be_judged_says_why_and_names_are_escaped(tmp_path: Path) -> None:
    name = "<b>x</b>"
    page = page_of(tmp_path, [run(size(1e6, name), tutor, 0, 4.0) for tutor in (None, teacher(4e6))])
    assert "not judged: complete seeds: 1, and" in page
    assert Page(page).num_charts == 3
    assert name not in page and "&lt;b&gt;x&lt;/b&gt;" in page
