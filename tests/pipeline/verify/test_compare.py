from __future__ import annotations

import numpy as np
import pytest

from capgap.pipeline.store.alignment import StoredError
from capgap.pipeline.verify.compare import apart, same_rows
from capgap.schemas.records import SampledTargets, TopkTargets


def _topk(ids: list[list[int]], logprobs: list[list[float]], labels: list[float]) -> TopkTargets:
    shape = (1, len(ids))
    return TopkTargets(
        np.array([ids], np.int32),
        np.array([logprobs], np.float32),
        np.zeros(shape, np.float32),
        np.array([labels], np.float32),
        np.zeros((*shape, 0), np.float32),
    )


def _sampled(rows: list[dict[int, int]], labels: list[float]) -> SampledTargets:
    return SampledTargets(
        np.array([[len(row) for row in rows]], np.int32),
        np.array([i for row in rows for i in row], np.int32),
        np.array([n for row in rows for n in row.values()], np.int32),
        np.array([labels], np.float32),
    )


def test_equal_rows_are_not_apart() -> None:
    rows = _topk([[5, 3], [1, 2]], [[-0.5, -1.0], [-0.25, -2.0]], [-0.5, -3.0])
    found = apart(rows, rows, 2)
    assert (found.max_nats, found.rms_nats, found.num_rows, found.num_other_rows) == (0, 0, 2, 0)
    assert same_rows(rows, rows).all()


def test_ids_are_matched_wherever_they_stand_in_a_row() -> None:
    kept = _topk([[5, 3]], [[-1.0, -1.5]], [-1.0])
    live = _topk([[3, 5]], [[-1.0, -1.25]], [-1.0])
    found = apart(kept, live, 2)
    # the label, id 5 and id 3
    assert (found.max_nats, found.num_other_rows) == (0.5, 0)
    assert found.rms_nats == pytest.approx(((0 + 0.25**2 + 0.5**2) / 3) ** 0.5)


def test_an_id_that_one_side_keeps_counts_by_how_far_it_lies_above_the_other_sides_last() -> None:
    kept = _topk([[5, 3]], [[-1.0, -2.0]], [-1.0])
    near = apart(kept, _topk([[5, 9]], [[-1.0, -2.0]], [-1.0]), 2)
    assert (near.max_nats, near.num_other_rows) == (0, 1)
    far = apart(kept, _topk([[5, 9]], [[-1.0, -1.5]], [-1.0]), 2)
    assert (far.max_nats, far.num_other_rows) == (0.5, 1)
    assert apart(kept, _topk([[5, 9]], [[-1.0, -4.0]], [-1.0]), 2).max_nats == 2.0


def test_a_row_that_holds_fewer_ids_is_held_against_as_many() -> None:
    kept = _topk([[5, 0]], [[-1.0, -np.inf]], [-1.0])
    found = apart(kept, _topk([[5, 0]], [[-1.0, -1.25]], [-1.0]), 2)
    assert (found.max_nats, found.num_other_rows) == (0, 0)


def test_logprobs_below_a_codecs_floor_are_raised_to_it_on_both_sides() -> None:
    kept = _topk([[5, 3]], [[-1.0, -24.0]], [-24.0])
    live = _topk([[5, 3]], [[-1.0, -90.0]], [-50.0])
    assert apart(kept, live, 2).max_nats == 66.0
    assert apart(kept, live, 2, StoredError(0.0, 0.0, -24.0)).max_nats == 0


def test_draws_that_fell_on_another_id_are_counted_row_by_row() -> None:
    kept = _sampled([{1: 3, 2: 1}, {7: 4}, {2: 2, 3: 2}], [-1.0, -2.0, -3.0])
    live = _sampled([{1: 2, 2: 2}, {7: 4}, {3: 2, 2: 2}], [-1.0, -2.5, -3.0])
    found = apart(kept, live, 4)
    assert (found.num_rows, found.num_other_rows, found.max_nats) == (3, 1, 0.5)
    assert found.moved_samples == pytest.approx(1 / 12)
    assert same_rows(kept, live).tolist() == [False, False, True], "a sample moved, a label's logprob, the order alone"


@pytest.mark.parametrize("shift", [0.0, 0.01], ids=["noise", "a shift of each id"])
def test_what_sequences_have_in_common_is_told_from_noise(shift: float) -> None:
    """Noise of 0.05 nats, and of each id a shift of a fifth of that, which adds 2 % to the spread."""
    rng = np.random.default_rng(0)
    num_sequences, seq_len, num_ids, vocab_size = 16, 32, 8, 40
    shape = (num_sequences, seq_len, num_ids)
    ids = np.argsort(rng.random((num_sequences, seq_len, vocab_size)), axis=2)[..., :num_ids].astype(np.int32)
    live = -np.sort(rng.random(shape), axis=2).astype(np.float32) * 5
    kept = live + (0.05 * rng.normal(size=shape) + shift * rng.normal(size=vocab_size)[ids]).astype(np.float32)
    rest = [np.zeros(shape[:2], np.float32), np.zeros(shape[:2], np.float32), np.zeros((*shape[:2], 0), np.float32)]
    found = apart(TopkTargets(ids, kept, *rest), TopkTargets(ids, live, *rest), num_ids)
    assert found.rms_nats == pytest.approx(0.05 * (8 / 9) ** 0.5, rel=0.1), "labels are alike, one in nine"
    # the share of the shift in the variance is 1 / 26; a standard error is a thousandth
    assert found.common_error < 0.01
    assert (found.common > 5 * found.common_error and found.common > 0.02) == (shift > 0)
