from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capgap.pipeline.cache.convert import to_targets
from capgap.pipeline.cache.scoring import Scored
from capgap.schemas.records import SampledTargets, TopkTargets

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))


@given(SHAPES.flatmap(lambda shape: arrays(np.int32, shape, elements=st.integers(0, 6))))
@settings(max_examples=200, deadline=None)
def test_draws_become_the_counts_of_their_row(draws_BLn: np.ndarray) -> None:
    draws_BLn = np.sort(draws_BLn, axis=2)
    labels_BL = np.arange(draws_BLn[..., 0].size, dtype=np.float32).reshape(draws_BLn.shape[:2])
    targets = to_targets(
        [_drawn(draws_Ln, labels_L) for draws_Ln, labels_L in zip(draws_BLn, labels_BL, strict=True)], "sampled"
    )
    assert isinstance(targets, SampledTargets)
    assert (targets.label_logprobs_BL == labels_BL).all()
    ends_N = targets.num_ids_BL.ravel().cumsum()
    for row_n, end, num_ids in zip(draws_BLn.reshape(len(ends_N), -1), ends_N, targets.num_ids_BL.ravel(), strict=True):
        part = slice(end - num_ids, end)
        found = list(zip(targets.ids_D[part].tolist(), targets.counts_D[part].tolist(), strict=True))
        assert found == sorted(Counter(row_n.tolist()).items())
    assert ends_N[-1] == len(targets.ids_D) == len(targets.counts_D)


def _drawn(draws_Ln: np.ndarray, labels_L: np.ndarray) -> Scored:
    none_LK = np.zeros((len(draws_Ln), 0), np.int32)
    return Scored(
        draws_Ln, none_LK, none_LK.astype(np.float32), labels_L, none_LK.astype(np.float32), labels_L, labels_L
    )


def test_kept_ids_are_stacked_in_the_order_of_the_sequences() -> None:
    rng = np.random.default_rng(0)
    scored = [
        Scored(
            np.zeros((4, 0), np.int32),
            rng.integers(0, 9, (4, 3), dtype=np.int32),
            rng.random((4, 3), dtype=np.float32),
            rng.random(4, dtype=np.float32),
            rng.random((4, 2), dtype=np.float32),
            *rng.random((2, 4), dtype=np.float32),
        )
        for _ in range(2)
    ]
    targets = to_targets(scored, "topk")
    assert isinstance(targets, TopkTargets)
    for i, s in enumerate(scored):
        assert (targets.ids_BLK[i] == s.ids_LK).all()
        assert (targets.logprobs_BLK[i] == s.logprobs_LK).all()
        assert (targets.tail_BL[i] == s.tail_L).all()
        assert (targets.log_tails_BLT[i] == s.log_tails_LT).all()
        assert (targets.label_logprobs_BL[i] == s.label_logprobs_L).all()
