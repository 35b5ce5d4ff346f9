"""A law over students, and when there is none."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from law_tables import planted, valley

from capgap.pipeline.law.fit import fit_table
from capgap.pipeline.law.global_law import describe
from capgap.pipeline.law.law_axes import axis_sentences
from capgap.pipeline.law.table import write_table
from capgap.schemas.law import LawRun
from capgap.schemas.law_fit import GlobalLaw

RATIOS = np.geomspace(1, 32, 6).tolist()


def law_of(tmp_path: Path, runs: tuple[LawRun, ...]) -> GlobalLaw:
    write_table(tmp_path / "runs.jsonl", runs)
    (law,) = fit_table(tmp_path / "runs.jsonl").laws
    return law


def test_a_planted_ratio_is_found_with_exponent_one(tmp_path: Path) -> None:
    law = law_of(tmp_path, planted(valley(4.0), [1e6, 2e6, 4e6, 8e6], RATIOS))
    assert law.refused is None
    assert law.proportional is not None and law.exponent is not None and law.slope is not None
    assert law.proportional.interval.low < 4.0 < law.proportional.interval.high
    assert law.exponent.interval.low < 1.0 < law.exponent.interval.high
    assert law.slope.interval.low < 4.0 < law.slope.interval.high
    assert "1 lies in the interval of the exponent" in law.remarks[0]
    assert "2.498 lies outside the interval of the slope" in law.remarks[1]


def test_a_planted_power_is_found(tmp_path: Path) -> None:
    def truth(teacher: float, student: float) -> float:
        return 4.0 + 0.01 * float(np.log(teacher / (student * 4.0 * (student / 1e6) ** 0.4))) ** 2

    law = law_of(tmp_path, planted(truth, [1e6, 2e6, 4e6, 8e6], np.geomspace(1, 64, 7).tolist()))
    assert law.exponent is not None
    assert law.exponent.interval.low < 1.4 < law.exponent.interval.high
    assert law.exponent.interval.low > 1.0


@pytest.mark.parametrize("num_students", [1, 2])
def test_fewer_than_three_students_make_no_law(tmp_path: Path, num_students: int) -> None:
    law = law_of(tmp_path, planted(valley(4.0), [1e6, 2e6][:num_students], RATIOS))
    assert law.refused is not None
    assert f"sizes of students with an interior best teacher: {num_students}, and 3 are needed" in law.refused
    assert law.slope is None and law.exponent is None
    assert describe(law).startswith("no law: ")


def test_students_that_are_not_interior_do_not_count(tmp_path: Path) -> None:
    """Their teachers still get better at the end of what was tried: the best tried is not the best."""

    def truth(teacher: float, student: float) -> float:
        return 4.0 + 0.01 * float(np.log(teacher / 16e6)) ** 2

    law = law_of(tmp_path, planted(truth, [0.1e6, 2e6, 4e6], RATIOS))
    assert law.students == ("m2000000", "m4000000")
    assert law.refused is not None and "m100000 (edge: " in law.refused


def test_the_law_stands_in_the_teachers_loss_too(tmp_path: Path) -> None:
    """The best is always 4 x, so by the table's rule its loss, 2 + 40 N^-0.25, falls as the student grows."""
    law = law_of(tmp_path, planted(valley(4.0), [1e6, 2e6, 4e6, 8e6], RATIOS))
    axes = {one.measure: one for one in law.axes}
    best, gap = axes["teacher's loss"], axes["gap in loss"]
    assert best.constant is not None and best.per_doubling is not None and gap.per_doubling is not None
    losses = [2.0 + 40.0 * (4 * size) ** -0.25 for size in (1e6, 2e6, 4e6, 8e6)]
    assert min(losses) < best.constant.value < max(losses)
    assert best.per_doubling.interval.low < np.mean(np.diff(losses)) < best.per_doubling.interval.high < 0
    # students alone are all alike here, so the gap opens as the teacher's loss falls
    assert gap.per_doubling.value == pytest.approx(-best.per_doubling.value, rel=0.2)
    said = list(axis_sentences(law))
    assert said[0].startswith("teacher's loss at the best teacher: 2.") and "it moves with the student: -0." in said[0]
    assert said[-1] == "no law of initial KL: no student was measured untrained, which a budget of 0 tokens does"


def test_what_an_interior_best_lacks_is_said_in_standard_errors_and_seeds(tmp_path: Path) -> None:
    """The valley's right side rises by half of what the noise lets through; its left side is plain to see."""

    def truth(teacher: float, student: float) -> float:
        away = float(np.log(teacher / student / 8.0))
        return 4.0 + (0.02 * away**2 if away < 0 else 0.001 * away)

    law = law_of(tmp_path, planted(truth, [1e6], RATIOS))
    assert law.refused is not None
    found = re.search(r"t32000000 is worse than the best by ([\d.]+) standard errors, ([\d.]+) are needed", law.refused)
    assert found is not None and float(found[1]) < float(found[2])
    assert "seeds in place of 3 would show it" in law.refused
    falling = law_of(tmp_path, planted(lambda t, s: 4.0 - 0.05 * float(np.log(t / s)), [1e6], RATIOS))
    assert "t32000000, at an end, is the best itself: teachers beyond it are needed" in str(falling.refused)
