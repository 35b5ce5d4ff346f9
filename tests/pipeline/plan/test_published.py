"""The published laws against the numbers that were published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from law_tables import planted

from capgap.pipeline.law.fit import fit_table
from capgap.pipeline.law.global_law import StudentBest, fit_line
from capgap.pipeline.law.table import write_table
from capgap.pipeline.plan.costs import paper_flops, training_flops
from capgap.pipeline.plan.published import (
    GAP_INTERCEPT,
    GAP_SLOPE,
    GivenTeacher,
    distilled_loss,
    gap_best_teacher,
    predictions,
    scaling_best_teacher,
    supervised_loss,
)
from capgap.schemas.results import Interval

TFLOPS = 1e12

# Name: parameters and training tokens as their makers published them; the compute column of the law's paper, TFLOPs.
BASELINES = {
    "LLaMA-2-7B": (7.0e9, 2.0e12, 84.0e9),
    "StableLM-3B": (3.0e9, 4.0e12, 72.0e9),
    "Qwen-1.8B": (1.8e9, 2.2e12, 23.8e9),
    "BTLM-3B": (3.0e9, 627e9, 11.3e9),
    "ShearedLLaMA-2.7B": (2.7e9, 50e9, 0.8e9),
}
MINIMA_3B = (3.02e9, 126e9, 6.88e9)


def test_the_papers_compute_of_its_own_model_comes_out() -> None:
    student, tokens, teacher = MINIMA_3B
    assert f"{paper_flops(student, tokens, teacher) / TFLOPS / 1e9:.1f}" == "4.0"


@pytest.mark.parametrize("name", BASELINES)
def test_the_papers_compute_of_a_baseline_comes_out(name: str) -> None:
    size, tokens, printed = BASELINES[name]
    assert f"{paper_flops(size, tokens) / TFLOPS / 1e9:.1f}" == f"{printed / 1e9:.1f}"


def test_the_papers_compute_of_phi_2_does_not_come_out() -> None:
    """2.7B parameters and the 1.4T tokens of its model card are a seventh of the 159.9E9 TFLOPs that are printed."""
    assert 159.9e9 / (training_flops(2.7e9, 1.4e12) / TFLOPS) == pytest.approx(7.05, abs=0.01)


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


def test_a_student_is_two_fifths_of_its_best_teacher() -> None:
    """The paper's corollary, a sparsity of 60 %, to the two digits that it has."""
    best = gap_best_teacher(3e9)
    assert best is not None
    assert 3e9 / best == pytest.approx(0.40, abs=0.005)


def test_the_line_says_nothing_where_its_teacher_is_smaller_than_the_student() -> None:
    assert gap_best_teacher(7e6) is None
    assert gap_best_teacher(8e6) is not None


def test_a_distilled_student_is_best_between_a_weak_and_a_far_stronger_teacher() -> None:
    """The published shape: for 1B parameters and 100 tokens for each, lowest near 9 x, 2.5 x 0.04 nats above it."""
    best = scaling_best_teacher(1e9, 1e11, 20)
    assert best is not None
    assert best / 1e9 == pytest.approx(9.2, abs=0.1)

    def at(ratio: float) -> float:
        return distilled_loss(1e9, 1e11, supervised_loss(ratio * 1e9, 20 * ratio * 1e9))

    assert at(2.5) - at(best / 1e9) == pytest.approx(0.041, abs=0.001)
    assert all(at(ratio) - at(best / 1e9) < 0.0055 for ratio in (5.2, 23))


def test_a_better_trained_teacher_is_best_at_a_smaller_size() -> None:
    short, long = scaling_best_teacher(1e9, 1e11, 20), scaling_best_teacher(1e9, 1e11, 100)
    assert short is not None and long is not None
    assert long < 0.7 * short


def test_every_prediction_names_its_source_and_whether_it_applies() -> None:
    teachers = [GivenTeacher("7B", 7e9), GivenTeacher("13B", 13e9), GivenTeacher("70B", 70e9)]
    gap, scaling = predictions(3e9, 126e9, teachers)
    assert "2311.07052" in gap.source and "2502.08606" in scaling.source
    assert gap.within_validity
    assert not scaling.within_validity, "its models end at 12.6B"
    assert predictions(3e9, 126e9, teachers[:1])[1].within_validity
    assert gap.best_size == pytest.approx(7.4825e9, rel=1e-4)
    assert "nearest: 7B" in gap.said
    assert "20 tokens a parameter (an assumption, none was given)" in scaling.said
    assert set(scaling.losses) == {"7B", "13B", "70B"}
    outside = predictions(1e6, 2e6, teachers)
    assert not any(one.within_validity for one in outside)


def test_known_teacher_tokens_are_used() -> None:
    (_, scaling) = predictions(3e9, 126e9, [GivenTeacher("7B", 7e9, 2e12)])
    assert "286 tokens a parameter (the median given)" in scaling.said
    assert scaling.losses["7B"] == pytest.approx(distilled_loss(3e9, 126e9, supervised_loss(7e9, 2e12)))
