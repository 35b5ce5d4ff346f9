"""What is kept in docs/results is what the code makes of the tables beside it."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_page_of_the_measurement_has_the_figures_of_its_table() -> None:
    page, runs = (RESULTS / "law-cpu.md").read_text(), read_table(RESULTS / "law-cpu" / "runs.jsonl")
    assert all(run.loss is not None for run in runs) and len(runs) == 60
    losses: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        assert run.loss is not None
        losses.setdefault((run.student.name, run.teacher.name if run.teacher else "none"), []).append(run.loss)
    for teacher in ("none", "27k", "115k", "380k", "1M", "3M"):
        (row,) = re.findall(rf"^\| {teacher} \|(.*)\|$", page, re.MULTILINE)
        cells = [cell.strip(" *") for cell in row.split("|")]
        for student, cell in (("s-27k", cells[1]), ("s-115k", cells[3])):
            found = losses[student, teacher if teacher == "none" else f"t-{teacher}"]
            assert len(found) == 5 and cell == f"{sum(found) / 5:.4f}"
