from __future__ import annotations

import pytest

from capgap.pipeline.plan.laws import best_ratio


@pytest.mark.parametrize(("tokens_per_parameter", "ratio"), [(20, 81), (50, 21), (100, 9), (250, 8.5)])
def test_the_best_ratio_falls_with_the_student_s_tokens(tokens_per_parameter: float, ratio: float) -> None:
    # ratios are steps of 2^(1/16) apart, and the bottom is flat
    assert best_ratio(1e9, tokens_per_parameter * 1e9)[0] == pytest.approx(ratio, rel=0.06)


def test_many_ratios_are_nearly_as_good() -> None:
    best, least, largest = best_ratio(1e9, 1e11)
    assert least < best < largest
    assert least == pytest.approx(5.4, rel=0.05) and largest == pytest.approx(23, rel=0.05)
