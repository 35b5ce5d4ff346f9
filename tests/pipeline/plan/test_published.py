from __future__ import annotations

import pytest

from capgap.pipeline.plan.published import best_ratio, distilled_loss, minima_teacher, supervised_loss


def test_the_paper_s_own_pair_is_near_its_law() -> None:
    # MiniMA-3B has 3.02B parameters, and its teacher 6.88B: 2.28 x, where the law says 2.49 x
    assert minima_teacher(3.02e9) == pytest.approx(2.498 * 3.02e9 - 11.498e6)
    assert minima_teacher(3.02e9) / 3.02e9 == pytest.approx(2.494, abs=0.001)


def test_a_supervised_loss_falls_with_parameters_and_tokens_towards_the_entropy_of_text() -> None:
    assert supervised_loss(1e9, 2e10) > supervised_loss(1e9, 2e11) > supervised_loss(1e10, 2e12) > 1.220


def test_a_student_of_a_perfect_teacher_is_worse_than_it_and_a_weak_teacher_holds_it_back() -> None:
    weak, fair = supervised_loss(1e8, 2e9), supervised_loss(5e9, 1e11)
    assert distilled_loss(1e9, 1e11, fair) > fair
    assert distilled_loss(1e9, 1e11, weak) > distilled_loss(1e9, 1e11, fair)


@pytest.mark.parametrize(("tokens_per_parameter", "ratio"), [(20, 81), (50, 21), (100, 9), (250, 8.5)])
def test_the_best_ratio_falls_with_the_student_s_tokens(tokens_per_parameter: float, ratio: float) -> None:
    # ratios are steps of 2^(1/16) apart, and the bottom is flat
    assert best_ratio(1e9, tokens_per_parameter * 1e9)[0] == pytest.approx(ratio, rel=0.06)


def test_many_ratios_are_nearly_as_good() -> None:
    best, least, largest = best_ratio(1e9, 1e11)
    assert least < best < largest
    assert least == pytest.approx(5.4, rel=0.05) and largest == pytest.approx(23, rel=0.05)
