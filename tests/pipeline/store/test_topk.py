"""Legend: B sequences, L targets a sequence, K ids kept a row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.pipeline.store import check_alignment, target_temperature_of
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.codec import TOPK_CODECS, Codec
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences, TopkTargets

PROFILES = list(TOPK_CODECS)
VOCAB_SIZES = st.sampled_from([1, 2, 255, 256, 257, 65535, 65536, 65537, 262144, 1 << 24])
CAPTURE, TEMPERATURES = 1.5, (0.5, 3.0)
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
    rng: np.random.Generator,
    num_sequences: int,
    length: int,
    vocab_size: int,
    top_k: int,
    spread: float,
    num_temperatures: int,
) -> TopkTargets:
    """Logprobs of any spread: some rows all alike, some past every floor; some tails of no id."""
    shape = (num_sequences, length, top_k)
    ids_NK = [rng.choice(vocab_size, top_k, replace=False) for _ in range(num_sequences * length)]
    logprobs_BLK = -np.sort(rng.exponential(spread, shape), axis=2)
    logprobs_BLK[rng.random(shape[:2]) < 0.2] = -1.25
    return TopkTargets(
        np.array(ids_NK, np.int32).reshape(shape),
        logprobs_BLK.astype(np.float32),
        rng.choice(TAILS, shape[:2]).astype(np.float32),
        -rng.exponential(spread, shape[:2]).astype(np.float32),
        _log_tails(rng, (*shape[:2], num_temperatures), vocab_size, spread),
    )


def _log_tails(rng: np.random.Generator, shape: tuple[int, ...], vocab_size: int, spread: float) -> np.ndarray:
    log_tails = np.log(vocab_size) - rng.exponential(spread, shape)
    log_tails[rng.random(shape) < 0.2] = -np.inf
    return log_tails.astype(np.float32)


def _round_trip(profile: str, targets: TopkTargets, vocab_size: int) -> TopkTargets:
    num_sequences, length, top_k = targets.ids_BLK.shape
    tokens_BL1 = np.zeros((num_sequences, length + 1), np.int32)
    temperatures = TEMPERATURES[: targets.log_tails_BLT.shape[2]]
    codec = Codec(TOPK_CODECS[profile], length, vocab_size, top_k, None, CAPTURE, temperatures)
    sequences = Sequences(tokens_BL1, tokens_BL1 == 0, tokens_BL1 == 0)
    _, found = codec.decode(codec.encode(sequences, targets), "here")
    assert isinstance(found, TopkTargets)
    return found


@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=80)
@given(
    vocab_size=VOCAB_SIZES,
    top_k=st.sampled_from([1, 2, 3, 9, 64]),
    spread=st.sampled_from([1e-3, 0.5, 3, 40, 1e4]),
    num_sequences=st.integers(0, 4),
    length=st.integers(1, 20),
    num_temperatures=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_targets_come_back_within_the_stated_error(
    profile, vocab_size, top_k, spread, num_sequences, length, num_temperatures, seed
) -> None:
    top_k, rng = min(top_k, vocab_size), np.random.default_rng(seed)
    targets = _targets(rng, num_sequences, length, vocab_size, top_k, spread, num_temperatures)
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
    for number, temperature in enumerate(TEMPERATURES[:num_temperatures]):
        dropped_BLK = np.where(is_kept_BLK, -np.inf, targets.logprobs_BLK.astype(np.float64) * (CAPTURE / temperature))
        expected_BL = np.logaddexp(targets.log_tails_BLT[..., number], np.logaddexp.reduce(dropped_BLK, axis=2))
        found_BL = found.log_tails_BLT[..., number]
        some_BL = np.isfinite(expected_BL)
        assert np.isneginf(found_BL[~some_BL]).all()
        if profile != "lossless":
            expected_BL = np.maximum(expected_BL, 17 - 65534 / 64)
        # 1e-7 of up to 1e5 nats
        apart_BL = np.abs(found_BL[some_BL] - expected_BL[some_BL]) - 1e-6 * np.abs(expected_BL[some_BL])
        assert apart_BL.max(initial=0) <= tail_nats


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
        np.full((1, 1, 1), np.log(0.001**3)).astype(np.float32),
    )
    found = _round_trip("small", targets, 9)
    # at a third of the temperature: the cubes of what is not stored
    assert np.exp(found.log_tails_BLT[0, 0, 0]) == pytest.approx(0.003**3 + 0.001**3 + 0.001**3, rel=1 / 100)
    assert found.ids_BLK[0, 0].tolist() == [4, 3, 2, 0, 0]
    assert np.isneginf(found.logprobs_BLK[0, 0]).tolist() == [False, False, False, True, True]
    assert found.tail_BL[0, 0] == pytest.approx(0.005, rel=1 / 128)


def test_small_keeps_all_of_a_row_that_comes_with_fewer_ids_than_others() -> None:
    """As its reader gives it: what was cut once is not cut again."""
    logprobs_LK = np.log(np.array([[0.995, 0.003, 0.001, 1], [0.5, 0.3, 0.1, 0.05]]))
    logprobs_LK[0, 3] = -np.inf
    targets = TopkTargets(
        np.array([[[4, 3, 2, 0], [8, 7, 6, 5]]], np.int32),
        logprobs_LK.astype(np.float32)[None],
        np.array([[0.001, 0.05]], np.float32),
        np.full((1, 2), -0.5, np.float32),
        np.zeros((1, 2, 0), np.float32),
    )
    once = _round_trip("small", targets, 9)
    assert once.ids_BLK.tolist() == targets.ids_BLK.tolist()
    assert np.isneginf(once.logprobs_BLK).tolist() == np.isneginf(targets.logprobs_BLK).tolist()
    assert np.isneginf(once.logprobs_BLK).sum() == 1
    assert once.tail_BL == pytest.approx(targets.tail_BL, rel=1 / 128)
    twice = _round_trip("small", once, 9)
    for name, array in vars(once).items():
        assert array.tobytes() == getattr(twice, name).tobytes(), name
    wide = dataclasses.replace(
        targets, logprobs_BLK=np.log(np.array([[[0.995, 0.003, 0.001, 0.0005]] * 2], np.float32))
    )
    codec = Codec(TOPK_CODECS["small"], 2, 9, 4, None, was_cut=True)
    sequences = Sequences(np.zeros((1, 3), np.int32), *(np.zeros((1, 3), np.bool_) for _ in range(2)))
    _, uncut = codec.decode(codec.encode(sequences, wide), "here")
    assert isinstance(uncut, TopkTargets) and np.isfinite(uncut.logprobs_BLK).all()
    assert np.isneginf(_round_trip("small", wide, 9).logprobs_BLK[..., 1:]).all(), "a row that was not cut is cut"
    with pytest.raises(InputError, match="logprobs_BLK: a value that is not finite"):
        _round_trip("compact", targets, 9)
    none = dataclasses.replace(targets, logprobs_BLK=np.full((1, 2, 4), -np.inf, np.float32))
    with pytest.raises(InputError, match="logprobs_BLK: a value that is not finite"):
        _round_trip("small", none, 9)


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


@pytest.mark.parametrize("profile", PROFILES)
def test_an_id_twice_in_a_row_is_refused(codecs, make_block, profile: str) -> None:
    codec = codecs[TOPK_CODECS[profile]]
    block = make_block(codec)
    ids_BLK = block.targets.ids_BLK.copy()
    ids_BLK[0, 2, 7] = ids_BLK[0, 2, 1]
    twice = dataclasses.replace(block.targets, ids_BLK=ids_BLK)
    with pytest.raises(InputError, match=f"ids: an id twice in a row; found id {ids_BLK[0, 2, 1]} in row 2, expected"):
        codec.encode(block.sequences, twice)


def test_padding_is_no_id_that_stands_twice_and_does_not_hide_one() -> None:
    logprobs_BLK = np.array([[[-0.5, -1.5, -2.0, -np.inf, -np.inf]]], np.float32)
    ids_BLK = np.array([[[4, 0, 3, 0, 0]]], np.int32)
    tail_BL, labels_BL = np.full((1, 1), 0.03, np.float32), np.full((1, 1), -0.5, np.float32)
    targets = TopkTargets(ids_BLK, logprobs_BLK, tail_BL, labels_BL, np.zeros((1, 1, 0), np.float32))
    assert _round_trip("small", targets, 9).ids_BLK.tolist() == ids_BLK.tolist()
    ids_BLK[0, 0, 2] = 4
    with pytest.raises(InputError, match="ids: an id twice in a row; found id 4 in row 0"):
        _round_trip("small", targets, 9)


@pytest.mark.parametrize("value", [np.nan, np.inf, np.log(300) + 1e-3])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_further_tail_that_is_none_is_refused(codecs, make_block, profile: str, value: float) -> None:
    codec = dataclasses.replace(codecs[TOPK_CODECS[profile]], extra_temperatures=(2.0,))
    block = make_block(codec)
    log_tails_BLT = block.targets.log_tails_BLT.copy()
    log_tails_BLT[1, 2, 0] = value
    with pytest.raises(InputError, match="log_tails_BLT: a value that is no logarithm of a tail; found"):
        codec.encode(block.sequences, dataclasses.replace(block.targets, log_tails_BLT=log_tails_BLT))
    with pytest.raises(InputError, match="log_tails_BLT: temperatures; found 1, expected 0"):
        codecs[codec.name].encode(block.sequences, block.targets)


@pytest.mark.parametrize("temperature", [0.01, 0.3, 2.0, 7.0, 1000.0])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_batch_at_another_temperature_is_within_the_error_that_follows_from_the_codecs(
    codecs, make_block, profile: str, temperature: float
) -> None:
    codec = dataclasses.replace(codecs[TOPK_CODECS[profile]], temperature=1.5, extra_temperatures=(9.0, temperature))
    block = make_block(codec, 20)
    stored = codec.decode(codec.encode(block.sequences, block.targets), "here")
    target = target_temperature_of(codec, 1.5, temperature)
    exact = dataclasses.replace(codec, name=TOPK_CODECS["lossless"])
    true = collate(
        [(block.sequences, block.targets, row) for row in range(20)], 0, target_temperature_of(exact, 1.5, temperature)
    )
    found = collate([(*stored, row) for row in range(20)], 0, target)
    kept_nats = 1.5 / temperature * ERRORS[profile][0]
    bound = kept_nats + max(kept_nats, ERRORS[profile][1]) + 1e-4
    kept = found.weights_NK > 1e-30
    apart = (found.weights_NK[kept].double() / true.weights_NK[kept].double()).log().abs()
    assert torch.isfinite(found.weights_NK).all() and apart.max() <= bound
    if profile != "small":
        some = true.tail_N > 1e-30
        apart = (found.tail_N[some].double() / true.tail_N[some].double()).log().abs()
        assert (
            torch.cat([apart, torch.zeros(1)]).max() <= ERRORS[profile][1] + max(kept_nats, ERRORS[profile][1]) + 1e-4
        )
    assert (found.weights_NK.sum(1) + found.tail_N - 1).abs().max() < 1e-5
