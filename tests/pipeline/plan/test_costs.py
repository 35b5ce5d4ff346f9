"""What work costs, and what no other beats at its cost."""

from __future__ import annotations

import pytest

from capgap.pipeline.plan.costs import non_dominated


@pytest.mark.parametrize(
    "costs, losses, expected",
    [
        ([1, 2, 3], [3, 2, 1], [True, True, True]),
        ([1, 2, 3], [1, 2, 3], [True, False, False]),
        ([1, 1, 2], [2, 3, 2], [True, False, False]),
        ([1, 1], [2, 2], [True, True]),
        ([1, 2, 3, 4], [4, 5, 2, 3], [True, False, True, False]),
    ],
)
def test_the_frontier_is_what_no_other_beats(costs: list[float], losses: list[float], expected: list[bool]) -> None:
    assert list(non_dominated(costs, losses)) == expected
