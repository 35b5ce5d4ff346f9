"""What is kept in docs/results is what the code makes of the tables beside it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from statistics import fmean

import pytest

from capgap.pipeline.law.fit import fit_table, read_fit
from capgap.pipeline.law.table import read_table
from capgap.schemas.law_curve import CurveFit

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_fit_of_the_measurement_is_that_of_its_table() -> None:
    folder = RESULTS / "law-cpu"
    again, kept = fit_table(folder / "runs.jsonl", "total", 0.005), read_fit(folder)
    assert [_verdicts(one) for one in again.curves] == [_verdicts(one) for one in kept.curves]
    for found, expected in zip(again.curves, kept.curves, strict=True):
        # other versions of numpy add in another order
        assert [point.loss for point in found.points] == pytest.approx([point.loss for point in expected.points])
        assert found.supervised_loss == pytest.approx(expected.supervised_loss)


def _verdicts(curve: CurveFit) -> tuple[str, ...]:
    return (curve.student, *(axis.verdict for axis in curve.axes))


def test_the_page_of_the_measurement_has_the_figures_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS.parents[1] / "benchmarks"))
    law_page, page_tables = map(importlib.import_module, ("law_page", "page_tables"))
    page, runs = law_page.PAGE.read_text(), read_table(law_page.FOLDER / "runs.jsonl")
    assert law_page.filled(page) == page
    assert all(run.loss is not None for run in runs)
    # one mean, found without the fit
    budget, alpha = law_page.MAIN
    own = [run for run in runs if run.budget == budget and run.alpha == alpha and run.student.name == "s-8k"]
    losses = [run.loss for run in own if run.teacher is not None and run.teacher.name == "t-1M"]
    table = page.partition(page_tables.mark("law_page.py", "means"))[2].partition(page_tables.END)[0]
    (row,) = re.findall(r"^\| t-1M \| ([^|]+) \|", table, re.MULTILINE)
    assert row.strip("*").split()[0] == f"{fmean(losses):.4f}"
