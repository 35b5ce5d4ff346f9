from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store.order import Order, Place, lanes_for
from capgap.schemas.errors import InputError

SHARDS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=12)


def _order(shards: list[list[int]], seed: int = 0, lanes: int | None = None) -> Order:
    return Order([sum(of) for of in shards], shards.__getitem__, sum(map(len, shards)), seed, lanes)


def _stream(order: Order, epoch: int = 0) -> list[Place]:
    return [order.locate(epoch, index) for index in range(len(order))]


def _every(shards: list[list[int]]) -> list[Place]:
    return [Place(s, m, row) for s, of in enumerate(shards) for m, size in enumerate(of) for row in range(size)]


@settings(max_examples=200)
@given(shards=SHARDS, lanes=st.none() | st.integers(1, 70), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_holds_every_sequence_once(shards, lanes, seed, epoch) -> None:
    order = _order(shards, seed, lanes)
    assert sorted(_stream(order, epoch)) == _every(shards)


@settings(max_examples=50)
@given(shards=SHARDS, lanes=st.none() | st.integers(1, 70), seed=st.integers(0, 2**40), data=st.data())
def test_every_sequence_may_stand_for_a_damaged_one_once(shards, lanes, seed, data) -> None:
    order = _order(shards, seed, lanes)
    index = data.draw(st.integers(0, len(order) - 1))
    candidates = list(order.candidates(1, index))
    assert candidates[0] == order.locate(1, index)
    assert sorted(candidates) == _every(shards)


def test_all_other_shards_make_up_for_a_lost_one() -> None:
    """Of 8 shards one is lost, 8 of 64 lanes: 320 sequences are made up for by 2240 others."""
    order = _order([[4] * 80] * 8)
    lost = [index for index in range(len(order)) if order.locate(0, index).shard == 3]
    taken = [next(place for place in order.candidates(0, index) if place.shard != 3) for index in lost]
    assert len(lost) == 320
    assert {place.shard for place in taken} == {0, 1, 2, 4, 5, 6, 7}
    # drawn at random, 320 of 2240 are 299 distinct ones on average; windows that are lost in part have fewer to give
    assert len(set(taken)) > 250


@settings(max_examples=50)
@given(shards=SHARDS, seed=st.integers(0, 2**40), data=st.data())
def test_a_place_is_known_without_those_before_it(shards, seed, data) -> None:
    stream = _stream(_order(shards, seed), 1)
    index = data.draw(st.integers(0, len(stream) - 1))
    assert _order(shards, seed).locate(1, index) == stream[index]


@pytest.mark.parametrize("shards", [[[8] * 40], [[8]] * 40, [[8] * 4] * 200])
def test_every_epoch_and_seed_has_an_order_of_its_own(shards) -> None:
    orders = [_stream(_order(shards, seed), epoch)[:320] for seed in range(4) for epoch in range(4)]
    agreements = [sum(map(np.array_equal, a, b)) for i, a in enumerate(orders) for b in orders[:i]]
    # two orders that know nothing of each other agree at 1 of 320 places on average; 15 never happens by chance
    assert max(agreements) < 15


@pytest.mark.parametrize(("num_members", "lanes"), [(1, 1), (3, 1), (4, 2), (8, 4), (127, 32), (128, 64), (10**6, 64)])
def test_small_sets_have_fewer_lanes(num_members: int, lanes: int) -> None:
    assert lanes_for(num_members) == lanes


def test_no_lanes_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="lanes; found 0"):
        _order([[1]], lanes=0)


@pytest.mark.parametrize("shards", [[[8] * 1000], [[8] * 10] * 100, [[8]] * 1000], ids=["1", "100", "1000 shards"])
def test_sequences_move_as_far_as_in_a_full_shuffle(shards) -> None:
    """Mean displacement over that of a full shuffle, N / 3, with 128 + 64 blocks of the 1000 in memory at most."""
    num = 8000
    where = {place: at for at, place in enumerate(_every(shards))}
    moves = [abs(at - where[place]) for epoch in range(8) for at, place in enumerate(_stream(_order(shards), epoch))]
    # members, not sequences, are shuffled freely: the mean of 8 x 1000 is within 0.8 % of its own in two of three cases
    assert np.mean(moves) / (num / 3) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shards", [[[8] * 1000], [[8] * 10] * 100])
def test_few_of_a_batch_come_from_one_member(shards) -> None:
    stream = _stream(_order(shards))
    batches = [stream[start : start + 64] for start in range(0, len(stream) - 63, 64)]
    distinct = np.mean([len({place[:2] for place in batch}) for batch in batches])
    assert distinct > 62, "a full shuffle of 1000 members has 62.0 distinct ones in 64"


@pytest.mark.parametrize("shards", [[[8] * 1000], [[8] * 10] * 100, [[5, 11] * 5] * 100])
def test_a_lane_holds_no_more_blocks_open_at_once_than_stated(shards) -> None:
    """A window of 2 members' sequences lies in up to 3, and has one of them from the window before."""
    stream = _stream(_order(shards))
    for lane in range(0, 64, 7):
        places = [place[:2] for place in stream[lane::64]]
        opened, closed = {b: at for at, b in reversed([*enumerate(places)])}, {b: at for at, b in enumerate(places)}
        assert max(sum(opened[b] <= at <= closed[b] for b in opened) for at in range(len(places))) <= 4


def test_the_blocks_of_two_ranks_overlap_at_the_borders_of_lanes_alone() -> None:
    stream = _stream(_order([[8] * 10] * 100))
    blocks = [{place[:2] for place in stream[rank::4]} for rank in range(4)]
    shared = sum(len(a & b) for a, b in itertools.combinations(blocks, 2))
    assert shared <= 63, "each of 63 borders between lanes can cut one member"


def test_only_shards_that_are_met_are_asked_for_their_members() -> None:
    """10,000 shards begin at once: a batch meets one shard a lane, whatever their number."""
    asked = []

    def sizes(shard: int) -> list[int]:
        asked.append(shard)
        return [4] * 25

    order = Order([100] * 10_000, sizes, 250_000, seed=0)
    places = [order.locate(0, index) for index in range(64)]
    assert len({place.shard for place in places}) == len(asked) == 64
    for index in range(500_000, 500_064):
        order.locate(0, index)
    assert len(asked) <= 192


def test_the_order_is_pinned() -> None:
    """A checkpoint holds a position alone, so an order that changes from version to version would resume wrongly."""
    order = _order([[2, 1, 3], [2, 2]], seed=7)
    assert (order.lanes, order.window) == (2, 128)
    assert [tuple(place) for place in _stream(order, 2)] == PINNED
    shards = [[3, 2] * 4] * 20
    assert [tuple(_order(shards, 1).locate(3, index)) for index in (0, 1, 200, 399)] == PINNED_LARGE


PINNED = [(1, 1, 0), (0, 2, 0), (1, 1, 1), (0, 0, 0), (1, 0, 1), (0, 0, 1), (1, 0, 0), (0, 2, 1), (0, 1, 0), (0, 2, 2)]
PINNED_LARGE = [(19, 2, 0), (19, 2, 2), (3, 4, 1), (16, 5, 1)]
