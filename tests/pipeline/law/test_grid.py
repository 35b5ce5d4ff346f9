"""Curves: what is complete is fitted, what is missing is named and in no mean."""

from __future__ import annotations

import numpy as np
import pytest
from law_tables import planted, run, size, teacher, valley

from capgap.pipeline.law.grid import curves, missing_runs
from capgap.schemas.law import LawRun


def without(runs: tuple[LawRun, ...], name: str) -> tuple[LawRun, ...]:
    kept = tuple(run for run in runs if run.name != name)
    assert len(kept) == len(runs) - 1, f"no run of the name {name}"
    return kept


def failed(run: LawRun, reason: str) -> LawRun:
    return LawRun.model_validate(run.model_dump() | {"loss": None, "missing": reason})


def grid() -> tuple[LawRun, ...]:
    return planted(valley(4.0), [1e6], [1, 2, 4, 8, 16])


LOST = "m1000000, t4000000, 2M, alpha 1, common, seed 1"


def test_losses_stand_by_teacher_and_seed() -> None:
    runs = grid()
    (curve,) = curves(runs)
    by_name = {run.name: run.loss for run in runs}
    assert [teacher.name for teacher in curve.teachers] == [f"t{n}000000" for n in (1, 2, 4, 8, 16)]
    assert curve.losses_MR[2, 1] == by_name[LOST]
    assert curve.supervised_MR[0, 1] == by_name["m1000000, supervised, 2M, alpha 0, common, seed 1"]
    assert curve.losses_MR.shape == curve.supervised_MR.shape == (5, 3)
    assert curve.missing == ()


def test_a_missing_run_takes_its_seed_out_of_the_curve_and_is_named() -> None:
    whole = curves(grid())[0]
    (curve,) = curves(without(grid(), LOST))
    assert curve.missing == (f"{LOST}: no row in the table",)
    assert curve.seeds == (0, 2) and curve.left_out_seeds == (1,)
    np.testing.assert_array_equal(curve.losses_MR, whole.losses_MR[:, [0, 2]])


def test_a_planned_run_without_a_result_is_named_with_its_reason() -> None:
    rows = tuple(
        LawRun.model_validate(run.model_dump() | {"loss": None, "missing": "out of memory"})
        if run.name == LOST
        else run
        for run in grid()
    )
    assert missing_runs(rows) == (f"{LOST}: out of memory",)
    assert curves(rows)[0].seeds == (0, 2)


def test_a_missing_supervised_run_takes_its_seed_out_too() -> None:
    name = "m1000000, supervised, 2M, alpha 0, common, seed 2"
    (curve,) = curves(without(grid(), name))
    assert curve.missing == (f"{name}: no row in the table",)
    assert curve.seeds == (0, 1)


def test_a_teacher_without_any_result_is_left_out_and_keeps_the_seeds() -> None:
    of_one = {run.name for run in grid() if run.teacher and run.teacher.name == "t4000000"}
    rows = tuple(failed(run, "diverged") if run.name in of_one else run for run in grid())
    (curve,) = curves(rows)
    assert curve.left_out_teachers == ("t4000000",)
    assert curve.seeds == (0, 1, 2)
    assert [teacher.name for teacher in curve.teachers] == [f"t{n}000000" for n in (1, 2, 8, 16)]
    assert len(curve.missing) == 3


def test_alphas_budgets_and_inits_are_curves_of_their_own() -> None:
    student, tutor = size(1e6), teacher(4e6)
    rows = [run(student, None, 0, 4.0), run(student, tutor, 0, 3.9), run(student, tutor, 0, 3.8, alpha=0.5)]
    rows += [run(student, one, 0, 3.7, budget="4M", tokens=4_000_000) for one in (None, tutor)]
    pruned = {"init": "pruned", "init_source": tutor.name}
    rows += [run(student, one, 0, 3.6, **pruned) for one in (None, tutor)]
    found = [(c.budget, c.alpha, c.init, float(c.losses_MR[0, 0]), float(c.supervised_MR[0, 0])) for c in curves(rows)]
    assert found == [
        ("2M", 0.5, "common", 3.8, 4.0),
        ("2M", 1.0, "common", 3.9, 4.0),
        ("4M", 1.0, "common", 3.7, 3.7),
        ("2M", 1.0, "pruned", 3.6, 3.6),
    ]


def test_the_budget_of_most_students_comes_first_and_within_it_the_smallest_student() -> None:
    small, large, tutor = size(1e6), size(2e6), teacher(4e6)
    rows = [run(large, one, 0, 3.9) for one in (None, tutor)]
    rows += [
        run(student, one, 0, 3.7, budget="4M", tokens=4_000_000) for student in (large, small) for one in (None, tutor)
    ]
    assert [(c.budget, c.student.name) for c in curves(rows)] == [
        ("4M", small.name),
        ("4M", large.name),
        ("2M", large.name),
    ]


def test_a_pruned_student_is_compared_with_the_same_one_trained_alone() -> None:
    student, rows = size(1e6), []
    for n, alone in ((2e6, 4.0), (4e6, 5.0)):
        pruned = {"init": "pruned", "init_source": teacher(n).name}
        rows += [run(student, None, 0, alone, **pruned), run(student, teacher(n), 0, 3.5, **pruned)]
    (curve,) = curves(rows)
    assert curve.supervised_MR[:, 0].tolist() == [4.0, 5.0]
    (curve,) = curves(rows[1:])
    assert curve.missing == ("m1000000, supervised, 2M, alpha 0, pruned from t2000000, seed 0: no row in the table",)
    assert curve.seeds == ()


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_rows_does_not_matter(order: int) -> None:
    (curve,) = curves(grid()[::order])
    np.testing.assert_array_equal(curve.losses_MR, curves(grid())[0].losses_MR)


def test_a_student_may_have_fewer_seeds_than_another() -> None:
    rows = (
        *planted(valley(4.0), [1e6], [1, 4, 16], num_seeds=5),
        *planted(valley(4.0), [2e6], [1, 4, 16], num_seeds=2),
    )
    assert [curve.seeds for curve in curves(rows)] == [(0, 1, 2, 3, 4), (0, 1)]
    assert missing_runs(rows) == ()
