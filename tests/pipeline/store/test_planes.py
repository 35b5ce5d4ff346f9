"""Legend: D numbers, N runs, B rows of W bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capgap.pipeline.store.planes import (
    cumulate_runs,
    join_planes,
    num_planes,
    pack_bits,
    pack_quads,
    split_planes,
    unpack_bits,
    unpack_quads,
)

BYTES = st.lists(st.integers(0, 255), max_size=40).map(lambda values: np.array(values, np.uint8))


@pytest.mark.parametrize(
    ("largest", "planes"), [(0, 1), (255, 1), (256, 2), (65535, 2), (65536, 3), ((1 << 24) - 1, 3)]
)
def test_a_number_takes_as_many_planes_as_it_has_bytes(largest: int, planes: int) -> None:
    assert num_planes(largest) == planes


@given(arrays(np.uint32, st.tuples(st.integers(0, 4), st.integers(0, 9))), st.integers(1, 4))
def test_planes_join_to_what_was_split(values, planes: int) -> None:
    values = values & np.uint32((1 << 8 * planes) - 1)
    split = split_planes(values, planes)
    assert [plane.dtype for plane in split] == [np.uint8] * planes
    assert all((plane == values >> 8 * i & 255).all() for i, plane in enumerate(split))
    joined = join_planes(split)
    assert joined.shape == values.shape and (joined == values).all()


def test_planes_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="planes of 3, 4 bytes"):
        join_planes([np.zeros(3, np.uint8), np.zeros(4, np.uint8)])


@given(arrays(np.bool_, st.tuples(st.integers(0, 4), st.integers(1, 20))))
def test_bits_come_back_in_order(flags_BW) -> None:
    packed = pack_bits(flags_BW)
    assert packed.shape[1] == -(-flags_BW.shape[1] // 8)
    assert (unpack_bits(packed, flags_BW.shape[1]) == flags_BW).all()


@given(BYTES)
def test_quads_come_back(values_D) -> None:
    quads, escapes = pack_quads(values_D)
    assert len(quads) == -(-len(values_D) // 4) and len(escapes) == (values_D >= 3).sum()
    assert (unpack_quads(quads, escapes, len(values_D)) == values_D).all()


def test_the_first_number_of_a_quad_is_its_lowest() -> None:
    quads, escapes = pack_quads(np.array([1, 2, 3, 0, 9], np.uint8))
    assert (quads.tolist(), escapes.tolist()) == ([0b00_11_10_01, 3], [0, 6])


@pytest.mark.parametrize(("quads", "escapes", "size"), [([3], [], 4), ([0], [1], 4), ([0, 0], [], 4), ([], [], 1)])
def test_quads_and_escapes_that_do_not_belong_together_are_refused(quads, escapes, size: int) -> None:
    with pytest.raises(ValueError, match=r"quads for|escapes, expected"):
        unpack_quads(np.array(quads, np.uint8), np.array(escapes, np.uint8), size)


@given(st.lists(st.lists(st.integers(0, (1 << 24) - 1), max_size=6), max_size=9))
def test_every_run_is_summed_on_its_own(runs: list[list[int]]) -> None:
    """The sums of all runs together may pass 2^32; those of each one may not."""
    steps_D = np.array([step for run in runs for step in run], np.uint32)
    found = cumulate_runs(steps_D, np.array([len(run) for run in runs], np.int64))
    assert found.tolist() == [value for run in runs for value in itertools.accumulate(run)]
    many = cumulate_runs(np.full(1 << 10, (1 << 24) - 1, np.uint32), np.full(1 << 10, 1))
    assert (many == (1 << 24) - 1).all()
