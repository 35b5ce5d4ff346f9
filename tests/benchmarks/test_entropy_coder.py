"""What benchmarks/entropy_coder.py and benchmarks/threshold_rows.py calculate is what they say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# with 8 samples the first two tokens are surely kept; the last column is a token that no row can sample twice
P_NK = np.array([[0.43, 0.2, 0.12, 0.1, 0.05], [0.5, 0.25, 0.1, 0.05, 0.04]])


@pytest.fixture
def coder(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import entropy_coder

    return entropy_coder


@pytest.fixture
def threshold_rows(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import threshold_rows

    return threshold_rows


def test_every_rank_lies_in_the_span_of_its_kind_and_kinds_rise_with_ranks(coder) -> None:
    ranks = np.arange(100_000)
    kinds = coder._kind_of(ranks)
    assert (np.diff(kinds) >= 0).all() and kinds[-1] < coder._NUM_KINDS
    for kind in np.unique(kinds)[:-1]:
        low, width = coder._span(kind)
        assert np.array_equal(ranks[kinds == kind], np.arange(low, low + width))


def test_what_the_coder_writes_it_reads_again(coder) -> None:
    pytest.importorskip("constriction")
    rng = np.random.default_rng(0)
    sizes_N = rng.integers(1, 9, 200)
    ranks_D = np.concatenate([np.sort(rng.choice(3000, size, replace=False)) for size in sizes_N])
    rows = coder.Rows(sizes_N, ranks_D, rng.integers(1, 9, len(ranks_D)))
    made = coder.Coder([rows], num_samples=8)
    assert made.decode(made.encode(rows), len(sizes_N)) == rows


def test_the_variance_of_systematic_samples_is_that_of_many_offsets(threshold_rows) -> None:
    offsets = (np.arange(20_000) + 0.5) / 20_000
    ends_NK = 8 * P_NK.cumsum(1)
    passed = np.ceil(ends_NK[:, :, None] - offsets)
    counts = np.diff(passed, axis=1, prepend=0)
    simulated = ((counts / 8 - P_NK[:, :, None]) ** 2).mean(2).sum(1).mean()
    # what is left of each row is a tail of tokens without weight: its variance is its mass over n
    tail_N = 1 - P_NK.sum(1)
    variance, ids, _ = threshold_rows.systematic_at(P_NK, tail_N, 8)
    assert variance == pytest.approx(simulated + tail_N.mean() / 8, rel=1e-3)
    assert ids == pytest.approx((counts > 0).mean(2).sum(1).mean() + 8 * tail_N.mean(), rel=1e-3)


def test_a_threshold_saves_the_variance_of_the_probable_tokens_and_no_other(threshold_rows) -> None:
    tail_N = 1 - P_NK.sum(1)
    found = threshold_rows.at(P_NK, tail_N, 8, id_bytes=1.3)
    part_NK = np.modf(8 * P_NK)[0]
    saved = np.where(P_NK >= 1 / 8, part_NK * (1 - part_NK), 0).sum(1).mean() / 64
    assert found["threshold_variance_share"] == pytest.approx(1 - saved / found["variance"], abs=1e-3)
    assert found["exact_ids_per_token"] == 2
