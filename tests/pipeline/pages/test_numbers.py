from __future__ import annotations

import pytest

from capgap.pipeline.pages.numbers import human_count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1k"),
        (1_240_000, "1.24M"),
        (34_500_000, "34.5M"),
        (7_610_000_000, "7.61B"),
        (2e12, "2T"),
        (999_499, "999k"),
        (999_999, "1M"),
        (3.5e15, "3500T"),
    ],
)
def test_counts_have_three_digits_and_a_letter(count: float, text: str) -> None:
    assert human_count(count) == text
