"""Costs by hand, and the settings of a grid that no other beats."""

from __future__ import annotations

from law_tables import cache, planted, run, size, teacher, valley

from capgap.pipeline.law.costs import STATED, flops, students_of_caches
from capgap.pipeline.law.frontier import frontiers
from capgap.schemas.law import LawRun
from capgap.schemas.law_frontier import Accounting, Frontier

SMALL, LARGE = size(1e6), size(3e6)
TEACHER = teacher(10e6)  # trained on 200M tokens
TRAINING, SCORING, TEACHING = 6 * 1e6 * 2e6, 2 * 10e6 * 2e6, 6 * 10e6 * 200e6


def cost(one: LawRun, accounting: Accounting, runs: list[LawRun]) -> float:
    return flops(one, accounting, students_of_caches(runs), {TEACHER.name: TEACHER})


def frontier(runs: list[LawRun], accounting: Accounting) -> Frontier:
    return next(one for one in frontiers(runs) if one.accounting == accounting)


def test_each_accounting_counts_what_it_states() -> None:
    alone, taught = run(SMALL, None, 0, 4.0), run(SMALL, TEACHER, 0, 3.9)
    runs = [alone, taught, run(SMALL, TEACHER, 1, 3.9), run(LARGE, TEACHER, 0, 3.8)]
    assert [cost(alone, name, runs) for name in STATED] == [TRAINING] * 3
    assert cost(taught, "paper", runs) == TRAINING + SCORING
    assert cost(taught, "shared", runs) == TRAINING + SCORING / 2  # two students; two seeds of one are one
    assert cost(taught, "everything", runs) == TRAINING + SCORING + TEACHING


def test_the_cached_tokens_are_what_the_teacher_scored() -> None:
    twice = run(SMALL, TEACHER, 0, 3.9, cache=cache(TEACHER, num_tokens=1_000_000))
    assert cost(twice, "paper", [twice]) == TRAINING + SCORING / 2


def test_a_student_cut_out_of_a_teacher_pays_for_its_training() -> None:
    alone = run(SMALL, None, 0, 4.0, init="pruned", init_source=TEACHER.name)
    taught = run(SMALL, TEACHER, 0, 3.9, init="pruned", init_source=TEACHER.name)
    assert cost(alone, "everything", [alone, taught]) == TRAINING + TEACHING
    assert cost(taught, "everything", [alone, taught]) == TRAINING + SCORING + TEACHING


def test_what_is_not_known_is_left_out_and_said() -> None:
    unknown = TEACHER.model_copy(update={"train_tokens": None})
    runs = [run(SMALL, None, 0, 4.0), run(SMALL, unknown, 0, 3.9)]
    found = frontier(runs, "everything")
    assert [point.supervised for point in found.points] == [True]
    assert found.left_out == (
        "m1000000, t10000000, 2M, alpha 1, common: the table does not say on how many tokens t10000000 was trained",
    )
    assert len(frontier(runs, "paper").points) == 2


def test_a_setting_without_one_of_its_seeds_is_left_out_and_said() -> None:
    runs = [run(SMALL, one, seed, 4.0) for one in (None, TEACHER) for seed in (0, 1)][:-1]
    found = frontier(runs, "paper")
    assert found.left_out == ("m1000000, t10000000, 2M, alpha 1, common: no result for seed 1",)
    assert [point.supervised for point in found.points] == [True]


def test_the_supervised_arm_stands_on_the_frontier_where_a_teacher_costs_too_much() -> None:
    runs = list(planted(valley(4.0), [1e6, 2e6], [1, 4, 16]))
    found = frontier(runs, "everything")
    assert found.points[0].supervised and found.points[0].on_frontier
    assert [point.num_seeds for point in found.points] == [3] * (2 * 4)
    assert list(found.points) == sorted(found.points, key=lambda point: point.flops)
