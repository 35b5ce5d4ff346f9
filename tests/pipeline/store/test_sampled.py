"""Legend: B sequences, L targets a sequence, N = B x L rows, D ids of all rows, n samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store import Ranking
from capgap.pipeline.store.codec import SAMPLED, Codec
from capgap.schemas.errors import InputError
from capgap.schemas.records import SampledTargets, Sequences

VOCAB_SIZES = st.sampled_from([1, 2, 255, 256, 257, 65535, 65536, 65537, 262144, 1 << 24])
NUM_SAMPLES = st.sampled_from([1, 2, 50, 255, 256, 65535])
LABEL_ERROR = 1 / 128


def _targets(rng: np.random.Generator, num_sequences: int, length: int, vocab_size: int, num_samples: int):
    """Rows of few and of many ids, certain ones, and such whose counts are all alike."""
    rows = []
    for _ in range(num_sequences * length):
        num_ids = int(
            rng.choice([1, min(num_samples, vocab_size, 40), rng.integers(1, min(num_samples, vocab_size, 40) + 1)])
        )
        ids = np.sort(rng.choice(vocab_size, num_ids, replace=False))
        cuts = np.sort(rng.choice(num_samples - 1, num_ids - 1, replace=False)) + 1 if num_ids > 1 else []
        counts = np.diff([0, *cuts, num_samples])
        if num_samples % num_ids == 0 and rng.random() < 0.5:
            counts = np.full(num_ids, num_samples // num_ids)
        rows.append((ids, counts))
    nothing = np.zeros(0, np.int32)
    return SampledTargets(
        np.array([len(ids) for ids, _ in rows], np.int32).reshape(num_sequences, length),
        np.concatenate([nothing, *(ids for ids, _ in rows)]).astype(np.int32),
        np.concatenate([nothing, *(counts for _, counts in rows)]).astype(np.int32),
        -rng.exponential(5, (num_sequences, length)).astype(np.float32),
    )


def _rows(targets: SampledTargets) -> list[list[tuple[int, int]]]:
    ends_N = np.cumsum(targets.num_ids_BL)
    pairs = list(zip(targets.ids_D.tolist(), targets.counts_D.tolist(), strict=True))
    return [pairs[end - size : end] for end, size in zip(ends_N, targets.num_ids_BL.ravel(), strict=True)]


@settings(max_examples=150)
@given(
    vocab_size=VOCAB_SIZES,
    num_samples=NUM_SAMPLES,
    num_sequences=st.integers(0, 4),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_ids_and_counts_come_back_exactly_and_labels_within_the_stated_error(
    vocab_size, num_samples, num_sequences, length, seed
) -> None:
    rng = np.random.default_rng(seed)
    targets = _targets(rng, num_sequences, length, vocab_size, num_samples)
    tokens_BL1 = rng.integers(0, vocab_size, (num_sequences, length + 1), dtype=np.int32)
    sequences = Sequences(tokens_BL1, tokens_BL1 % 3 == 0, tokens_BL1 % 5 > 0)
    codec = Codec(SAMPLED, length, vocab_size, num_samples)
    _, found = codec.decode(codec.encode(sequences, targets), "here")
    assert [sorted(row) for row in _rows(found)] == [sorted(row) for row in _rows(targets)]
    for name, array in vars(targets).items():
        assert getattr(found, name).dtype == array.dtype and getattr(found, name).shape == array.shape, name
    # a label's own rounding in float32 is far below the millionth that is left for it
    assert np.abs(found.label_logprobs_BL - targets.label_logprobs_BL).max(initial=0) <= LABEL_ERROR + 1e-6
    _, again = codec.decode(codec.encode(sequences, found), "here")
    for name, array in vars(found).items():
        assert array.tobytes() == getattr(again, name).tobytes(), f"{name} changes when it is stored once more"


def test_a_row_lies_by_falling_count_and_then_by_rising_rank(codecs, make_block) -> None:
    ranking = Ranking(np.random.default_rng(0).permutation(300).astype(np.int32))
    codec = dataclasses.replace(codecs[SAMPLED], ranking=ranking)
    block = make_block(codecs[SAMPLED])
    _, found = codec.decode(codec.encode(block.sequences, block.targets), "here")
    for row in _rows(found):
        keys = [(-count, int(ranking.ranks_V[i])) for i, count in row]
        assert keys == sorted(keys)


def test_an_id_that_was_drawn_once_costs_nothing_but_itself(codecs, make_block) -> None:
    block = make_block(codecs[SAMPLED])
    raw = zstandard.ZstdDecompressor().decompress(codecs[SAMPLED].encode(block.sequences, block.targets))
    batch = pa.ipc.open_stream(raw).read_next_batch()
    assert len(batch["counts"].values) == (block.targets.counts_D > 1).sum() < len(block.targets.counts_D)


@pytest.mark.parametrize("logprob", [-2000.0, -1e30])
def test_labels_below_the_floor_become_the_floor(codecs, make_block, logprob: float) -> None:
    block = make_block(codecs[SAMPLED])
    labels_BL = np.full_like(block.targets.label_logprobs_BL, logprob)
    targets = dataclasses.replace(block.targets, label_logprobs_BL=labels_BL)
    _, found = codecs[SAMPLED].decode(codecs[SAMPLED].encode(block.sequences, targets), "here")
    assert (found.label_logprobs_BL == -65535 / 64).all()


def _broken(array: np.ndarray, value: float) -> np.ndarray:
    copy = array.copy()
    copy.flat[copy.size // 2] = value
    return copy


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("counts_D", lambda a: _broken(a, a.flat[a.size // 2] + 1), "counts of row ROW do not sum; found 21, expected"),
        ("counts_D", lambda a: _broken(a, 0), "an id without samples"),
        ("counts_D", lambda a: a[:-1], "ids, counts and num_ids disagree"),
        ("num_ids_BL", lambda a: _broken(a, 0), "ids, counts and num_ids disagree"),
        ("num_ids_BL", lambda a: np.roll(a, 1), "counts of row 0 do not sum"),
    ],
)
def test_counts_that_do_not_fit_their_rows_are_refused(
    codecs, make_block, field: str, change: Callable[..., np.ndarray], message: str
) -> None:
    block = make_block(codecs[SAMPLED])
    row = int(np.searchsorted(np.cumsum(block.targets.num_ids_BL), len(block.targets.counts_D) // 2, "right"))
    targets = dataclasses.replace(block.targets, **{field: change(getattr(block.targets, field))})
    with pytest.raises(InputError, match=message.replace("ROW", str(row))):
        codecs[SAMPLED].encode(block.sequences, targets)


def test_a_row_without_ids_is_refused_though_all_numbers_add_up(codecs, make_block) -> None:
    block = make_block(codecs[SAMPLED])
    num_ids_BL = block.targets.num_ids_BL.copy()
    num_ids_BL[0, 1] += num_ids_BL[0, 0]
    num_ids_BL[0, 0] = 0
    with pytest.raises(InputError, match="a row without ids"):
        codecs[SAMPLED].encode(block.sequences, dataclasses.replace(block.targets, num_ids_BL=num_ids_BL))


@pytest.mark.parametrize(("ids", "counts"), [([5, 5, 6], [1, 1, 18]), ([5, 6, 5], [9, 10, 1]), ([5, 6, 5], [2, 16, 2])])
def test_an_id_twice_in_a_row_is_refused(codecs, make_block, ids: list[int], counts: list[int]) -> None:
    targets = make_block(codecs[SAMPLED]).targets
    first = int(targets.num_ids_BL[0, 0])
    num_ids_BL = targets.num_ids_BL.copy()
    num_ids_BL[0, 0] = 3
    ids_D, counts_D = (
        np.array([*own, *rest[first:]], np.int32) for own, rest in ((ids, targets.ids_D), (counts, targets.counts_D))
    )
    twice = dataclasses.replace(targets, num_ids_BL=num_ids_BL, ids_D=ids_D, counts_D=counts_D)
    with pytest.raises(InputError, match=r"ids: an id twice in a row; found id 5 in row 0, expected distinct ids"):
        codecs[SAMPLED].encode(make_block(codecs[SAMPLED]).sequences, twice)
