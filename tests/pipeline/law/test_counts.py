"""Counts as people write them."""

from __future__ import annotations

import pytest

from capgap.pipeline.law.counts import parse_count, parse_counts
from capgap.schemas.errors import SettingError


@pytest.mark.parametrize(
    "text, count",
    [
        ("3B", 3_000_000_000),
        ("350M", 350_000_000),
        ("126B", 126_000_000_000),
        ("2.5T", 2_500_000_000_000),
        ("44k", 44_000),
        ("44K", 44_000),
        ("7b", 7_000_000_000),
        ("1.5e9", 1_500_000_000),
        ("1000", 1000),
        (" 3B ", 3_000_000_000),
        ("9e18", 9 * 10**18),
    ],
)
def test_a_count_is_a_number_and_a_letter(text: str, count: int) -> None:
    assert parse_count(text, "--student") == count


@pytest.mark.parametrize(
    "text", ["", "B", "3G", "-3B", "0", "0.1", "3 B", "nan", "1e400", "3BB", "1e99", "1e19", "9223373T"]
)
def test_what_is_no_count_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(SettingError, match="--student: not a count"):
        parse_count(text, "--student")


def test_several_stand_between_commas() -> None:
    assert parse_counts("7B,13B, 70B", "--teachers") == (7 * 10**9, 13 * 10**9, 70 * 10**9)
