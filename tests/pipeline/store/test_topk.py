"""Legend: B sequences, L targets a sequence, K ids kept a row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store import check_alignment
from capgap.pipeline.store.codec import TOPK_CODECS, Codec
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences, TopkTargets

PROFILES = list(TOPK_CODECS)
VOCAB_SIZES = st.sampled_from([1, 2, 255, 256, 257, 65535, 65536, 65537, 262144, 1 << 24])
TAILS = [0.0, 1e-45, 1e-38, 1e-9, 0.25, 1.0]
# nats: a kept logprob, the tail's logarithm and a label, as docs/format.md states them; 1e-5 is float32's rounding
ERRORS = {
    "lossless": (0, 0, 0),
    "near-lossless": (1 / 128 + 1e-5, 1 / 128 + 1e-5, 1 / 128 + 1e-5),
    "compact": (1 / 10 + 1e-5, 1 / 128 + 1e-5, 1 / 128 + 1e-5),
    "small": (1 / 10 + 1e-5, 1 / 128 + 1e-5, 1 / 128 + 1e-5),
}
FLOORS = {"lossless": -np.inf, "near-lossless": -65535 / 64, "compact": -23.9236, "small": -23.9236}


def _targets(
    rng: np.random.Generator, num_sequences: int, length: int, vocab_size: int, num_kept: int, spread: float
) -> TopkTargets:
    """Logprobs of any spread: some rows all alike, some past every floor."""
    shape = (num_sequences, length, num_kept)
    ids_NK = [rng.choice(vocab_size, num_kept, replace=False) for _ in range(num_sequences * length)]
    logprobs_BLK = -np.sort(rng.exponential(spread, shape), axis=2)
    logprobs_BLK[rng.random(shape[:2]) < 0.2] = -1.25
    return TopkTargets(
        np.array(ids_NK, np.int32).reshape(shape),
        logprobs_BLK.astype(np.float32),
        rng.choice(TAILS, shape[:2]).astype(np.float32),
        -rng.exponential(spread, shape[:2]).astype(np.float32),
    )


def _round_trip(profile: str, targets: TopkTargets, vocab_size: int) -> TopkTargets:
    num_sequences, length, num_kept = targets.ids_BLK.shape
    tokens_BL1 = np.zeros((num_sequences, length + 1), np.int32)
    codec = Codec(TOPK_CODECS[profile], length, vocab_size, num_kept)
    sequences = Sequences(tokens_BL1, tokens_BL1 == 0, tokens_BL1 == 0)
    _, found = codec.decode(codec.encode(sequences, targets), "here")
    assert isinstance(found, TopkTargets)
    return found


@pytest.mark.parametrize("profile", PROFILES)
@settings(deadline=None, max_examples=80)
@given(
    vocab_size=VOCAB_SIZES,
    num_kept=st.sampled_from([1, 2, 3, 9, 64]),
    spread=st.sampled_from([1e-3, 0.5, 3, 40, 1e4]),
    num_sequences=st.integers(0, 4),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_targets_come_back_within_the_stated_error(
    profile, vocab_size, num_kept, spread, num_sequences, length, seed
) -> None:
    num_kept = min(num_kept, vocab_size)
    targets = _targets(np.random.default_rng(seed), num_sequences, length, vocab_size, num_kept, spread)
    found = _round_trip(profile, targets, vocab_size)
    for name, array in vars(targets).items():
        assert getattr(found, name).dtype == array.dtype and getattr(found, name).shape == array.shape, name
    kept_nats, tail_nats, label_nats = ERRORS[profile]
    is_kept_BLK = np.isfinite(found.logprobs_BLK)
    if profile == "small":
        assert (is_kept_BLK == _kept(targets)).all()
        assert (found.ids_BLK[~is_kept_BLK] == 0).all()
    else:
        assert is_kept_BLK.all()
    assert (found.ids_BLK[is_kept_BLK] == targets.ids_BLK[is_kept_BLK]).all()
    expected_BLK = np.maximum(targets.logprobs_BLK, FLOORS[profile])
    assert np.abs(found.logprobs_BLK - expected_BLK)[is_kept_BLK].max(initial=0) <= kept_nats
    labels_BL = targets.label_logprobs_BL
    if profile != "lossless":
        labels_BL = np.maximum(labels_BL, -65535 / 64)
    assert np.abs(found.label_logprobs_BL - labels_BL).max(initial=0) <= label_nats
    tail_BL = targets.tail_BL + np.where(is_kept_BLK, 0, np.exp(targets.logprobs_BLK)).sum(axis=2)
    tail_BL = np.minimum(tail_BL, 1)  # these rows are made up, and may hold more than 1
    some_BL = tail_BL > 0
    assert (found.tail_BL[~some_BL] == 0).all() and (found.tail_BL[some_BL] > 0).all()
    # numbers below 1e-38 lose bits of their own
    ratio = np.log(found.tail_BL[tail_BL > 2e-38].astype(np.float64) / tail_BL[tail_BL > 2e-38])
    assert np.abs(ratio).max(initial=0) <= tail_nats


def _kept(targets: TopkTargets) -> np.ndarray:
    """The fewest of each row that hold 99 %, one sum after the other."""
    kept_BLK = np.zeros(targets.ids_BLK.shape, np.bool_)
    for b, of_sequence in enumerate(np.exp(targets.logprobs_BLK)):
        for i, probabilities_K in enumerate(of_sequence):
            held = np.float32(0)
            for k, probability in enumerate(probabilities_K):
                kept_BLK[b, i, k] = k == 0 or held < 0.99
                held += probability
    return kept_BLK


@pytest.mark.parametrize("profile", PROFILES[:3])
def test_what_was_read_is_written_as_it_is(codecs, make_block, profile: str) -> None:
    codec = codecs[TOPK_CODECS[profile]]
    block = make_block(codec)
    _, once = codec.decode(codec.encode(block.sequences, block.targets), "here")
    _, twice = codec.decode(codec.encode(block.sequences, once), "here")
    for name, array in vars(once).items():
        assert array.tobytes() == getattr(twice, name).tobytes(), name


@pytest.mark.parametrize("profile", PROFILES)
def test_probability_is_neither_lost_nor_won(codecs, make_block, profile: str) -> None:
    """Kept ids and tail sum to 1 within the stated error: e^(1/10) - 1 of what is kept, at the most."""
    codec = codecs[TOPK_CODECS[profile]]
    block = make_block(codec, 20)
    _, found = codec.decode(codec.encode(block.sequences, block.targets), "here")
    total_BL = np.exp(found.logprobs_BLK).sum(axis=2) + found.tail_BL
    assert np.abs(total_BL - 1).max() <= np.expm1(ERRORS[profile][0] + 1e-4)


def test_small_keeps_less_and_moves_the_rest_to_the_tail() -> None:
    probabilities_K = np.array([0.6, 0.3, 0.095, 0.003, 0.001])
    targets = TopkTargets(
        np.arange(5, dtype=np.int32)[::-1].reshape(1, 1, 5).copy(),
        np.log(probabilities_K).astype(np.float32).reshape(1, 1, 5),
        np.array([[0.001]], np.float32),
        np.array([[-0.5]], np.float32),
    )
    found = _round_trip("small", targets, 9)
    assert found.ids_BLK[0, 0].tolist() == [4, 3, 2, 0, 0]
    assert np.isneginf(found.logprobs_BLK[0, 0]).tolist() == [False, False, False, True, True]
    assert found.tail_BL[0, 0] == pytest.approx(0.005, rel=1 / 128)


@pytest.mark.parametrize("profile", PROFILES)
def test_stored_targets_of_a_softmax_are_found_aligned(codecs, make_block, profile: str) -> None:
    codec = codecs[TOPK_CODECS[profile]]
    block = make_block(codec, 40)
    sequences, found = codec.decode(codec.encode(block.sequences, block.targets), "here")
    check_alignment(sequences, found, codec.num_ids, "here", codec.error)


@pytest.mark.parametrize("profile", PROFILES)
def test_logprobs_that_rise_and_tails_that_are_none_are_refused(codecs, make_block, profile: str) -> None:
    codec = codecs[TOPK_CODECS[profile]]
    block = make_block(codec)
    rising = dataclasses.replace(block.targets, logprobs_BLK=block.targets.logprobs_BLK[:, :, ::-1].copy())
    with pytest.raises(InputError, match="logprobs that rise within a row"):
        codec.encode(block.sequences, rising)
    for tail in (-0.5, 1.5):
        wrong = dataclasses.replace(block.targets, tail_BL=np.full_like(block.targets.tail_BL, tail))
        with pytest.raises(InputError, match=f"a tail that is no probability; found {tail}"):
            codec.encode(block.sequences, wrong)
