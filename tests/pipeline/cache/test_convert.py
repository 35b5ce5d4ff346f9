from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capgap.pipeline.cache.convert import join, to_requests, to_targets
from capgap.pipeline.cache.scoring import Request, Scored
from capgap.schemas.records import SampledTargets, TopkTargets

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))


@given(SHAPES.flatmap(lambda shape: arrays(np.int32, shape, elements=st.integers(0, 6))))
@settings(max_examples=200)
def test_draws_become_the_counts_of_their_row(samples_BLn: np.ndarray) -> None:
    samples_BLn = np.sort(samples_BLn, axis=2)
    labels_BL = np.arange(samples_BLn[..., 0].size, dtype=np.float32).reshape(samples_BLn.shape[:2])
    targets = to_targets(
        [_drawn(samples_Ln, labels_L) for samples_Ln, labels_L in zip(samples_BLn, labels_BL, strict=True)], "sampled"
    )
    assert isinstance(targets, SampledTargets)
    assert (targets.label_logprobs_BL == labels_BL).all()
    ends_N = targets.num_ids_BL.ravel().cumsum()
    for row_n, end, num_ids in zip(
        samples_BLn.reshape(len(ends_N), -1), ends_N, targets.num_ids_BL.ravel(), strict=True
    ):
        part = slice(end - num_ids, end)
        found = list(zip(targets.ids_D[part].tolist(), targets.counts_D[part].tolist(), strict=True))
        assert found == sorted(Counter(row_n.tolist()).items())
    assert ends_N[-1] == len(targets.ids_D) == len(targets.counts_D)


def _drawn(samples_Ln: np.ndarray, labels_L: np.ndarray) -> Scored:
    none_LK = np.zeros((len(samples_Ln), 0), np.int32)
    return Scored(samples_Ln, none_LK, none_LK.astype(np.float32), labels_L, none_LK.astype(np.float32), labels_L, 0.0)


def test_kept_ids_are_stacked_in_the_order_of_the_sequences() -> None:
    rng = np.random.default_rng(0)
    scored = [
        Scored(
            np.zeros((4, 0), np.int32),
            rng.integers(0, 9, (4, 3), dtype=np.int32),
            rng.random((4, 3), dtype=np.float32),
            rng.random(4, dtype=np.float32),
            rng.random((4, 2), dtype=np.float32),
            rng.random(4, dtype=np.float32),
            0.0,
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


STARTS = st.lists(st.booleans(), min_size=9, max_size=9)


@given(STARTS)
def test_the_documents_of_a_sequence_are_requests_that_cover_every_target_once(starts: list[bool]) -> None:
    tokens_L1, starts_L1 = np.arange(9, dtype=np.int32) * 3, np.array(starts)
    requests = to_requests(tokens_L1, starts_L1, "document")
    first = 0
    for request in requests:
        num_targets = len(request.tokens_L1) - 1
        assert request.tokens_L1.tolist() == tokens_L1[first : first + num_targets + 1].tolist()
        # a document begins where a request does, and nowhere within it; what the label starts is another's matter
        assert first == 0 or starts_L1[first]
        assert not starts_L1[first + 1 : first + num_targets].any()
        first += num_targets
    assert first == 8
    assert len({request.digest for request in requests}) == len(requests)


def test_a_packed_sequence_is_one_request() -> None:
    tokens_L1 = np.arange(9, dtype=np.int32)
    (request,) = to_requests(tokens_L1, np.ones(9, np.bool_), "packed")
    assert (request.tokens_L1 == tokens_L1).all()
    assert request.digest == Request(tokens_L1).digest


def test_a_document_that_comes_twice_is_drawn_from_twice() -> None:
    tokens_L1 = np.array([1, 2, 3, 1, 2, 3, 1], np.int32)
    starts_L1 = np.array([True, False, False, True, False, False, True])
    first, second = to_requests(tokens_L1, starts_L1, "document")
    assert (first.tokens_L1 == second.tokens_L1).all() and first.digest != second.digest
    again = to_requests(tokens_L1, starts_L1, "document")
    assert [request.digest for request in again] == [first.digest, second.digest]


def test_the_rows_of_requests_are_joined_in_their_order() -> None:
    rng = np.random.default_rng(1)
    parts = [
        Scored(
            rng.integers(0, 9, (n, 4), dtype=np.int32),
            rng.integers(0, 9, (n, 2), dtype=np.int32),
            rng.random((n, 2), dtype=np.float32),
            rng.random(n, dtype=np.float32),
            rng.random((n, 3), dtype=np.float32),
            rng.random(n, dtype=np.float32),
            float(n),
        )
        for n in (1, 5, 2)
    ]
    joined = join(parts)
    assert joined.top_logprob == 2, "of the last request's last row"
    for name, array in list(vars(joined).items())[:-1]:
        assert array.tobytes() == b"".join(getattr(part, name).tobytes() for part in parts)
    assert joined.log_tails_LT.shape == (8, 3)
