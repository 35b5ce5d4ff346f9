from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.kernels.sampling import offsets

DIGEST = bytes(range(16))
GOLDEN_START = [9149823, 15600252, 14080721, 6280703]
GOLDEN_LATER = [15011735, 5287222, 10418912]


@settings(max_examples=50)
@given(start=st.integers(0, 10_000), num_rows=st.integers(0, 70), seed=st.integers(0, 2**63 - 1))
def test_an_offset_depends_on_its_position_and_not_on_the_batch(start: int, num_rows: int, seed: int) -> None:
    whole = offsets(seed, DIGEST, 0, start + num_rows)
    np.testing.assert_array_equal(offsets(seed, DIGEST, start, num_rows), whole[start:])


def test_every_position_may_be_asked_for_alone() -> None:
    whole = offsets(3, DIGEST, 0, 33)
    alone = [offsets(3, DIGEST, position, 1)[0] for position in range(33)]
    np.testing.assert_array_equal(alone, whole)


def test_offsets_are_float32_in_zero_to_one() -> None:
    values = offsets(0, DIGEST, 0, 200_000)
    assert values.dtype == np.float32
    assert values.min() >= 0 and values.max() < 1
    # 2^24 levels: of 200000 offsets the largest lies above 1 - 2^-12 but for a chance of e^-48
    assert values.max() > 1 - 2**-12


def test_offsets_are_uniform() -> None:
    counts, _ = np.histogram(offsets(1, DIGEST, 0, 100_000), bins=100, range=(0, 1))
    chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
    # 99 degrees of freedom: mean 99, deviation 14; six deviations either way
    assert 15 < chi_squared < 183


def test_another_seed_or_sequence_gives_other_offsets() -> None:
    base = offsets(1, DIGEST, 0, 64)
    for other in (offsets(2, DIGEST, 0, 64), offsets(1, DIGEST[::-1], 0, 64), offsets(1, b"", 0, 64)):
        assert (base != other).mean() > 0.9
        # 64 uniform pairs: a correlation above 0.6 has a chance below 1e-6
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.6


def test_seed_and_digest_do_not_run_into_each_other() -> None:
    assert (offsets(1, b"1:", 0, 8) != offsets(11, b":", 0, 8)).any()


def test_offsets_stay_what_they_were_when_caches_were_made_with_them() -> None:
    assert (offsets(0, DIGEST, 0, 4) * 2**24).astype(int).tolist() == GOLDEN_START
    assert (offsets(7, DIGEST, 1000, 3) * 2**24).astype(int).tolist() == GOLDEN_LATER


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start, num_rows: got -1, 4"):
        offsets(0, DIGEST, -1, 4)
