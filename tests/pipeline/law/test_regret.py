"""Rules for choosing a teacher, scored on tables whose best teacher is known."""

from __future__ import annotations

import numpy as np
import pytest
from law_tables import planted, run, size, teacher, valley

from capgap.pipeline.law.grid import curves
from capgap.pipeline.law.regret import regret_tables
from capgap.schemas.law import LawRun
from capgap.schemas.law_regret import RegretTable, RuleScore

RATIOS = np.geomspace(1, 64, 7).tolist()
SIZES = [1e6, 2e6, 4e6]


def scored(runs: tuple[LawRun, ...] | list[LawRun]) -> tuple[RegretTable, dict[str, RuleScore]]:
    (table,) = regret_tables(curves(runs), "total")
    return table, {rule.name: rule for rule in table.rules}


def test_a_rule_that_is_right_loses_nothing_and_stands_first() -> None:
    table, rules = scored(planted(valley(4.0), SIZES, RATIOS))
    right = rules["constant ratio, fitted"]
    assert right.regret == 0.0 and table.rules[0] == right
    assert [choice.teacher for choice in right.choices] == ["t4000000", "t8000000", "t16000000"]
    # 64 x is 2.77 of a natural logarithm from 4 x, and the valley rises by 0.01 of its square
    assert rules["largest teacher"].regret == pytest.approx(0.01 * np.log(16) ** 2, abs=0.005)
    assert rules["own size"].regret == pytest.approx(0.01 * np.log(4) ** 2, abs=0.005)
    for wrong in ("largest teacher", "own size"):
        assert rules[wrong].interval is not None and rules[wrong].behind is not None
        assert rules[wrong].interval.low > 0 and rules[wrong].behind.low > 0


def test_each_planted_truth_is_found_by_its_own_rule() -> None:
    def falling(teacher: float, student: float) -> float:
        return 4.0 - 0.02 * float(np.log(teacher / student))

    assert scored(planted(falling, SIZES, RATIOS))[1]["largest teacher"].regret == 0.0
    _, rules = scored(planted(valley(1.0), SIZES, RATIOS))
    assert rules["own size"].regret == 0.0 and (rules["largest teacher"].regret or 0) > 0.1
    every = [teacher(2e6 * 4**i) for i in range(5)]  # all students have the same teachers, the best is of 32M
    same = [
        run(size(number), tutor, seed, 4.0 + abs(np.log(tutor.num_parameters / 32e6)) if tutor else 5.0)
        for number in (0.1e6, 2e6, 30e6)
        for tutor in (None, *every)
        for seed in (0, 1)
    ]
    _, rules = scored(same)
    assert rules["one teacher for all, fitted"].regret == 0.0
    assert (rules["constant ratio, fitted"].regret or 0) > 0.5


def test_a_rule_never_sees_the_student_that_it_chooses_for() -> None:
    """One student's best is 16 x, the others' is 1 x: the fitted ratio sends it to 1 x and pays for it."""
    runs = [*planted(valley(1.0), SIZES[:2], RATIOS), *planted(valley(16.0), SIZES[2:], RATIOS, seed=1)]
    choices = {choice.student: choice for choice in scored(runs)[1]["constant ratio, fitted"].choices}
    assert choices["m4000000"].teacher == "t4000000"
    assert choices["m4000000"].regret == pytest.approx(0.01 * np.log(16) ** 2, abs=0.005)


def test_published_rules_say_where_they_are_out_of_their_range() -> None:
    _, rules = scored(planted(valley(4.0), SIZES, RATIOS))
    names = ("m1000000", "m2000000", "m4000000")
    assert rules["law of capacity gap"].outside == rules["distillation scaling law"].outside == names
    # its intercept makes its best smaller than these students: the slope alone chooses 2 x, of 1, 2 and 4
    assert [one.teacher for one in rules["law of capacity gap"].choices] == ["t2000000", "t4000000", "t8000000"]
    _, rules = scored(planted(valley(4.0), [100e6, 200e6, 400e6], RATIOS))
    assert rules["law of capacity gap"].outside == ()


def test_what_cannot_be_followed_says_why() -> None:
    table, rules = scored(planted(valley(4.0), SIZES[:1], RATIOS))
    assert "there is none" in str(rules["constant ratio, fitted"].refused)
    assert "add a budget of 0 tokens" in str(rules["least initial KL"].refused)
    assert rules["least initial KL"].regret is None and table.rules[-1].regret is None
    assert regret_tables(curves(planted(valley(4.0), SIZES, RATIOS, num_seeds=1)), "total") == ()


def test_the_initial_kl_of_untrained_students_is_a_rule() -> None:
    """Untrained rows make no curve of their own; the truth follows the KL and not the size."""
    divergence = dict(zip(RATIOS, [0.9, 0.3, 0.7, 0.2, 0.8, 0.5, 0.6], strict=True))

    def truth(teacher: float, student: float) -> float:
        ratio = min(RATIOS, key=lambda one: abs(one - teacher / student))
        return 4.0 + abs(divergence[ratio] - 0.5)

    runs = list(planted(truth, SIZES, RATIOS, noise=1e-4))
    for one in planted(truth, SIZES, RATIOS, num_seeds=1):
        if one.teacher is not None:
            ratio = min(RATIOS, key=lambda r: abs(r - one.teacher.num_parameters / one.student.num_parameters))
            untrained = {"tokens": 0, "budget": "none", "metrics": {"kl": divergence[ratio]}}
            runs.append(one.model_copy(update=untrained))
    table, rules = scored(runs)
    assert table.budget == "2M" and rules["constant initial KL, fitted"].regret == 0.0
    assert (rules["least initial KL"].regret or 0) == pytest.approx(0.3, abs=0.01)


def test_noise_alone_has_a_price() -> None:
    """A student's other seeds name its best teacher, but where noise is as large as the valley."""
    assert scored(planted(valley(4.0), SIZES, RATIOS, noise=1e-6))[0].floor == pytest.approx(0, abs=1e-5)
    assert scored(planted(valley(4.0, bend=1e-4), SIZES, RATIOS, noise=0.02))[0].floor > 0.005
