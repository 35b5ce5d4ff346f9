"""Legend: B sequences, L targets a sequence, N = B x L rows, V vocabulary, K ids kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from capgap.kernels.sampling import topk_rows
from capgap.pipeline.store import check_alignment
from capgap.pipeline.store.alignment import EXACT, StoredError
from capgap.pipeline.store.codec import SAMPLED, TOPK, TOPK_CODECS, Codec
from capgap.schemas.errors import CorruptError
from capgap.schemas.records import SampledTargets, Sequences, Targets, TopkTargets

# where one id is kept or one sample taken, hardly a neighbour contradicts a row: 5 is the fewest that is claimed here
SIZES = [(300, 20), (300, 300), (17, 5), (2000, 5), (2000, 64)]


def _codec(name: str, vocab_size: int, num_ids: int) -> Codec:
    return Codec(name, 16, vocab_size, num_ids)


@pytest.mark.parametrize(("vocab_size", "num_ids"), SIZES)
@pytest.mark.parametrize("name", [SAMPLED, TOPK])
@pytest.mark.parametrize("seed", range(5))
def test_targets_of_a_softmax_pass(make_block, name: str, vocab_size: int, num_ids: int, seed: int) -> None:
    block = make_block(_codec(name, vocab_size, num_ids), 16, seed)
    check_alignment(block.sequences, block.targets, num_ids, "here")


@pytest.mark.parametrize(("vocab_size", "num_ids"), SIZES)
@pytest.mark.parametrize("name", [SAMPLED, TOPK])
@pytest.mark.parametrize("shift", [-1, 1])
def test_distributions_one_position_off_fail(make_block, name: str, vocab_size: int, num_ids: int, shift: int) -> None:
    """The kept ids of a row stand at its neighbour; the logprobs of the next tokens stay where they are."""
    block = make_block(_codec(name, vocab_size, num_ids), 16)
    shifted = _shifted(block.targets, shift)
    with pytest.raises(CorruptError, match=r"here, sequence \d+, target \d+: targets are not aligned"):
        check_alignment(block.sequences, shifted, num_ids, "here")


@pytest.mark.parametrize(("vocab_size", "num_ids"), SIZES)
@pytest.mark.parametrize("name", [SAMPLED, TOPK])
@pytest.mark.parametrize("shift", [-1, 1])
def test_tokens_one_position_off_fail(make_block, name: str, vocab_size: int, num_ids: int, shift: int) -> None:
    block = make_block(_codec(name, vocab_size, num_ids), 16)
    tokens_BL1 = np.roll(block.sequences.tokens_BL1, shift, axis=1)
    with pytest.raises(CorruptError, match="targets are not aligned"):
        check_alignment(dataclasses.replace(block.sequences, tokens_BL1=tokens_BL1), block.targets, num_ids, "here")


STORED = [SAMPLED, *TOPK_CODECS.values()]


@pytest.mark.parametrize(("vocab_size", "num_ids"), SIZES)
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_stored_passes_within_the_codecs_error(make_block, stored, name, vocab_size, num_ids, seed) -> None:
    codec = Codec(name, 16, vocab_size, min(num_ids, vocab_size))
    block = stored(codec, make_block(codec, 16, seed))
    check_alignment(block.sequences, block.targets, codec.num_ids, "here", codec.error)


@pytest.mark.parametrize(("vocab_size", "num_ids"), SIZES)
@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("shift", [-1, 1])
def test_what_was_stored_one_position_off_fails_for_all_the_codecs_error(
    make_block, stored, name: str, vocab_size: int, num_ids: int, shift: int
) -> None:
    codec = Codec(name, 16, vocab_size, min(num_ids, vocab_size))
    block = stored(codec, make_block(codec, 16))
    tokens_BL1 = np.roll(block.sequences.tokens_BL1, shift, axis=1)
    moved = dataclasses.replace(block.sequences, tokens_BL1=tokens_BL1)
    with pytest.raises(CorruptError, match="targets are not aligned"):
        check_alignment(moved, block.targets, codec.num_ids, "here", codec.error)
    shifted = _shifted(block.targets, shift)
    with pytest.raises(CorruptError, match="targets are not aligned"):
        check_alignment(block.sequences, shifted, codec.num_ids, "here", codec.error)


@pytest.mark.parametrize(("off", "passes"), [(0.13, True), (0.14, False)])
def test_a_kept_label_may_differ_by_both_errors_and_no_more(off: float, passes: bool) -> None:
    sequences, targets = _topk(1)
    moved = dataclasses.replace(targets, label_logprobs_BL=targets.label_logprobs_BL - np.float32(off))
    error = StoredError(label_nats=1 / 128, kept_nats=1 / 8)
    assert _passes(sequences, moved, error=error) is passes


def test_a_label_below_the_floor_is_compared_with_the_floor() -> None:
    sequences, targets = _topk(2)
    low = np.array([[[-0.1, -3.0, -24.0]]], np.float32)
    moved = dataclasses.replace(targets, logprobs_BLK=low, label_logprobs_BL=np.array([[-60.0]], np.float32))
    assert not _passes(sequences, moved)
    assert _passes(sequences, moved, error=StoredError(floor_nats=-24.0))


def test_padding_is_no_kept_id_though_the_label_is_0() -> None:
    """Id 0 is the label; it stands in the row as padding, and its logprob is below that of the last kept id."""
    sequences = _sequence(0)
    targets = TopkTargets(
        np.array([[[3, 2, 0]]], np.int32),
        np.array([[[-0.1, -3.0, -np.inf]]], np.float32),
        np.array([[0.05]], np.float32),
        np.array([[-4.0]], np.float32),
        np.zeros((1, 1, 0), np.float32),
    )
    assert _passes(sequences, targets)
    assert not _passes(sequences, dataclasses.replace(targets, label_logprobs_BL=np.array([[-2.0]], np.float32)))


def _shifted(targets: Targets, shift: int) -> Targets:
    if isinstance(targets, TopkTargets):
        moved = {
            name: np.roll(getattr(targets, name), shift, axis=1) for name in ("ids_BLK", "logprobs_BLK", "tail_BL")
        }
        return dataclasses.replace(targets, **moved)
    rows = np.split(np.arange(len(targets.ids_D)), np.cumsum(targets.num_ids_BL)[:-1])
    order = np.roll(np.arange(len(rows)).reshape(targets.num_ids_BL.shape), shift, axis=1)
    entries_D = np.concatenate([rows[row] for row in order.ravel()])
    return SampledTargets(
        np.roll(targets.num_ids_BL, shift, axis=1),
        targets.ids_D[entries_D],
        targets.counts_D[entries_D],
        targets.label_logprobs_BL,
    )


def _topk(label: int, top_k: int = 3) -> tuple[Sequences, TopkTargets]:
    """One target: probabilities 0.4 0.3 0.2 0.1 for the ids 0 to 3, of which the first are kept."""
    logits_1V = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    rows = topk_rows(logits_1V, torch.tensor([label]), top_k)
    return _sequence(label), TopkTargets(
        rows.ids_NK[None].numpy(), rows.logprobs_NK[None].numpy(), rows.tail_N[None].numpy(),
        rows.label_logprobs_N[None].numpy(), rows.log_tails_NT[None].numpy(),
    )  # fmt: skip


def _sequence(label: int) -> Sequences:
    return Sequences(np.array([[0, label]], np.int32), np.zeros((1, 2), np.bool_), np.ones((1, 2), np.bool_))


def _passes(sequences: Sequences, targets: Targets, num_samples: int = 0, error: StoredError = EXACT) -> bool:
    try:
        check_alignment(sequences, targets, num_samples, "here", error)
    except CorruptError:
        return False
    return True


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize(("error", "passes"), [(0, True), (5e-5, True), (-5e-5, True), (3e-4, False), (-3e-4, False)])
def test_a_kept_label_must_have_its_own_logprob(label: int, error: float, passes: bool) -> None:
    # rounding of float32 logprobs up to 100 is 4e-6; a neighbouring row differs by far more than 1e-4
    sequences, targets = _topk(label)
    moved = dataclasses.replace(targets, label_logprobs_BL=targets.label_logprobs_BL + np.float32(error))
    assert _passes(sequences, moved) is passes


@pytest.mark.parametrize(("probability", "passes"), [(0.1, True), (1e-30, True), (0.2, True), (0.21, False)])
def test_a_label_that_is_not_kept_is_at_most_as_likely_as_the_last_kept_id(probability: float, passes: bool) -> None:
    sequences, targets = _topk(3)
    label_logprobs_BL = np.log(np.array([[probability]], np.float32))
    assert _passes(sequences, dataclasses.replace(targets, label_logprobs_BL=label_logprobs_BL)) is passes


@pytest.mark.parametrize(
    ("count", "expected_draws", "passes"),
    [
        (4, 4.0, True),
        (4, 4.99, True),
        (4, 3.01, True),
        (4, 5.02, False),
        (4, 2.98, False),
        (0, 0.99, True),
        (0, 1.02, False),
    ],
)
def test_a_labels_count_is_the_floor_or_the_ceiling_of_its_share(
    count: int, expected_draws: float, passes: bool
) -> None:
    """Systematic sampling allows less than one sample of difference; a hundredth is left for rounding."""
    ids = [(1, count), (2, 10 - count)] if count else [(2, 10)]
    targets = SampledTargets(
        np.array([[len(ids)]], np.int32),
        np.array([i for i, _ in ids], np.int32),
        np.array([c for _, c in ids], np.int32),
        np.log(np.array([[expected_draws / 10]], np.float32)),
    )
    assert _passes(_sequence(1), targets, 10) is passes


def test_the_first_row_at_fault_is_named(make_block) -> None:
    block = make_block(_codec(TOPK, 300, 20), 6)
    label_logprobs_BL = block.targets.label_logprobs_BL.copy()
    label_logprobs_BL[3, 7] = 0
    label_logprobs_BL[5, 1] = 0
    broken = dataclasses.replace(block.targets, label_logprobs_BL=label_logprobs_BL)
    with pytest.raises(CorruptError, match=r"shard 4, sequence 3, target 7: .* found 2 of 96 targets"):
        check_alignment(block.sequences, broken, 20, "shard 4")
