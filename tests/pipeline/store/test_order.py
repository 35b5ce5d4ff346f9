from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store.order import EpochOrder

MEMBER_SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(any)


def _every(sizes: list[int]) -> list[tuple[int, int]]:
    return [(member, row) for member, size in enumerate(sizes) for row in range(size)]


@settings(deadline=None, max_examples=200)
@given(sizes=MEMBER_SIZES, window=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_sequence_once(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = EpochOrder(sizes, seed, epoch, window)
    assert len(order) == sum(sizes)
    assert sorted(order.locate(0, len(order))) == _every(sizes)


@settings(deadline=None, max_examples=200)
@given(sizes=MEMBER_SIZES, window=st.integers(1, 40), seed=st.integers(0, 2**40), data=st.data())
def test_a_stretch_is_the_stretches_that_it_is_made_of(sizes, window, seed, data) -> None:
    order = EpochOrder(sizes, seed, 1, window)
    a, b, c = sorted(data.draw(st.lists(st.integers(0, len(order)), min_size=3, max_size=3)))
    assert order.locate(a, b) + order.locate(b, c) == order.locate(a, c)
    # another object, asked for the last stretch alone, knows the same
    assert EpochOrder(sizes, seed, 1, window).locate(b, c) == order.locate(b, c)


@pytest.mark.parametrize("window", [1, 7, 64])
def test_every_epoch_and_seed_has_an_order_of_its_own(window: int) -> None:
    sizes = [8] * 40
    orders = [tuple(EpochOrder(sizes, seed, epoch, window).locate(0, 320)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    # two orders that know nothing of each other agree at 1 of 320 places on average; 15 never happens by chance
    agreements = [sum(map(np.array_equal, a, b)) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(agreements) < 15


def test_no_more_members_are_open_at_once_than_the_window_holds() -> None:
    sizes = [5] * 23
    located = EpochOrder(sizes, 3, 0, 4).locate(0, 115)
    for start in range(0, 115, 20):
        members = Counter(member for member, _ in located[start : start + 20])
        assert set(members.values()) == {5}, "a window is read to its end before the next begins"
        assert len(members) <= 4


@pytest.mark.parametrize("window", [64, 100])
def test_sequences_move_as_far_as_in_a_full_shuffle_where_the_window_holds_everything(window: int) -> None:
    sizes, num = [8] * 64, 512
    moves = []
    for epoch in range(40):
        located = EpochOrder(sizes, 0, epoch, window).locate(0, num)
        moves += [abs(place - (8 * member + row)) for place, (member, row) in enumerate(located)]
    # a full shuffle moves a sequence N / 3 on average, with a deviation of N / sqrt(18): the mean of 40 x 512 is
    # within 0.5 % of N / 3 in two of three cases, and 2 % is four deviations
    assert np.mean(moves) == pytest.approx(num / 3, rel=0.02)


def test_neighbours_of_a_member_part_where_the_window_holds_everything() -> None:
    located = EpochOrder([8] * 64, 0, 0, 64).locate(0, 512)
    together = sum(a[0] == b[0] for a, b in itertools.pairwise(located))
    # a neighbour is of the same member in 7 of 511 cases: 7 of 512 places on average, and more than 20 never by chance
    assert together <= 20


def test_the_order_is_pinned() -> None:
    """A checkpoint holds a position alone, so an order that changes from version to version would resume wrongly."""
    located = EpochOrder([2, 1, 3], seed=7, epoch=2, window_members=2).locate(0, 6)
    assert located == [(0, 1), (1, 0), (0, 0), (2, 0), (2, 1), (2, 2)]
