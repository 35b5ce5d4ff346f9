"""The published line comes out of our own fit, where the data obey it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from law_tables import planted

from capgap.pipeline.law.fit import fit_table
from capgap.pipeline.law.global_law import StudentBest, fit_line
from capgap.pipeline.law.table import write_table
from capgap.pipeline.plan.published import GAP_INTERCEPT, GAP_SLOPE, gap_best_teacher
from capgap.schemas.results import Interval


def test_the_papers_line_comes_out_of_bests_that_lie_on_it() -> None:
    """The single bests were not published, so R^2 = 0.9957 cannot come out: of the line's own points it is 1."""
    students = []
    for size in (28e6, 70e6, 140e6, 400e6, 1.1e9):
        best = gap_best_teacher(size)
        assert best is not None
        students.append(StudentBest(f"{size:g}", size, best, Interval(low=best / 1.2, high=best * 1.2)))
    slope, intercept, r_squared = fit_line(students)
    assert f"{slope:.3f}" == "2.498"
    assert f"{intercept / 1e6:.3f}" == "-11.498"
    assert r_squared == pytest.approx(1.0)


def test_the_papers_line_comes_out_of_a_table_of_runs_that_obey_it(tmp_path: Path) -> None:
    def truth(teacher: float, student: float) -> float:
        return 4.0 + 0.01 * float(np.log(teacher / (GAP_SLOPE * student + GAP_INTERCEPT))) ** 2

    # noise of a hundred-thousandth of a nat: what is left is the rounding of sizes and of the fits
    runs = planted(truth, [70e6, 140e6, 400e6, 1.1e9], np.geomspace(0.8, 12, 7).tolist(), noise=1e-5)
    write_table(tmp_path / "runs.jsonl", runs)
    law = fit_table(tmp_path / "runs.jsonl").laws[0]
    assert law.slope is not None and law.intercept is not None
    assert f"{law.slope.value:.2f}" == "2.50"
    assert law.intercept.value == pytest.approx(-11.498e6, abs=0.5e6)
    assert law.slope.interval.low <= GAP_SLOPE <= law.slope.interval.high
