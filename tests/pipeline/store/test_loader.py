"""Legend: B sequences, L targets a sequence, N = B x L rows, K ids of the widest row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from capgap.pipeline.store import Batch, SequenceLoader, ShardReader
from capgap.pipeline.store.batch import IGNORED_LABEL, collate
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK
from capgap.schemas.errors import InputError

# 41 sequences: micro-batches of 4 leave one sequence over, and 10 micro-batches do not divide by 3 or 4 ranks
SIZES = ((7, 5), (9,), (1, 6, 8, 5))


@pytest.fixture
def reader(codecs, make_reader) -> ShardReader:
    return make_reader(codecs[SAMPLED], SIZES)


def _same(a: Batch, b: Batch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


def _all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
@pytest.mark.parametrize("position", [0, 1, 9, 10, 11, 24, 25])
def test_what_remains_after_a_resume_is_the_same_to_the_bit(codecs, make_reader, name: str, position: int) -> None:
    reader = make_reader(codecs[name], SIZES)
    whole = list(SequenceLoader(reader, 4, 25, seed=3))  # two and a half epochs
    first = SequenceLoader(reader, 4, 25, seed=3)
    begun = list(itertools.islice(first, position))
    assert _all_same(begun, whole[:position])
    second = SequenceLoader(reader, 4, 25, seed=3)
    second.load_state_dict(first.state_dict())
    assert _all_same(list(second), whole[position:])
    assert len(second) == 25


@pytest.mark.parametrize("world_size", [1, 2])
def test_smaller_micro_batches_hold_the_same_sequences_step_by_step(reader, world_size: int) -> None:
    """Steps of 8 sequences a rank: an epoch of 41 holds 5 of them for one rank and 2 for two."""
    per_epoch = 5 // world_size
    num_steps = 3 * per_epoch * world_size
    whole = list(SequenceLoader(reader, 8, num_steps, 1, 0, world_size))
    for accumulate in (2, 4, 8):
        size = 8 // accumulate
        ranks = [
            SequenceLoader(reader, size, num_steps * accumulate, 1, rank, world_size, accumulate)
            for rank in range(world_size)
        ]
        assert {len(rank) for rank in ranks} == {3 * per_epoch * accumulate}
        together = [batch for step in zip(*ranks, strict=True) for batch in step]
        rows = [row for batch in together for row in _rows(batch)]
        epochs = [
            rows[start : start + 8 * per_epoch * world_size]
            for start in range(0, len(rows), 8 * per_epoch * world_size)
        ]
        assert [len(set(epoch)) for epoch in epochs] == [8 * per_epoch * world_size] * 3
        if world_size == 1:
            assert rows == [row for batch in whole for row in _rows(batch)]


def test_the_state_of_a_loader_at_its_end_leaves_nothing(reader) -> None:
    loader = SequenceLoader(reader, 4, 12, seed=3)
    assert len(list(loader)) == 12
    assert list(loader) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_holds_no_sequence_twice_and_leaves_out_only_what_fills_no_micro_batch(reader, seed: int) -> None:
    rows = [row for batch in SequenceLoader(reader, 4, 10, seed) for row in _rows(batch)]
    assert len(set(rows)) == len(rows) == 40


def _rows(batch: Batch) -> list[bytes]:
    return [row.numpy().tobytes() for row in batch.input_ids_BL]


def test_seeds_and_epochs_have_orders_of_their_own(reader) -> None:
    streams = [list(SequenceLoader(reader, 4, 20, seed)) for seed in (0, 1)]
    epochs = [part for stream in streams for part in (stream[:10], stream[10:])]
    firsts = {tuple(row for batch in epoch for row in _rows(batch)) for epoch in epochs}
    assert len(firsts) == 4


@pytest.mark.parametrize("world_size", [2, 5, 10])
def test_ranks_are_disjoint_and_together_the_stream_of_one(reader, world_size: int) -> None:
    """These divide an epoch's 10 micro-batches, so the streams agree over all epochs."""
    alone = list(SequenceLoader(reader, 4, 30, seed=1))
    ranks = [SequenceLoader(reader, 4, 30, 1, rank, world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {30 // world_size}
    streams = [list(rank) for rank in ranks]
    assert {len(stream) for stream in streams} == {30 // world_size}
    together = [batch for step in zip(*streams, strict=True) for batch in step]
    assert _all_same(together, alone)
    for step in range(30 // world_size):
        seen = [row for stream in streams for row in _rows(stream[step])]
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("world_size", "per_epoch"), [(3, 9), (4, 8)])
def test_ranks_that_do_not_divide_an_epoch_leave_its_end_out(reader, world_size: int, per_epoch: int) -> None:
    alone = list(SequenceLoader(reader, 4, 10, seed=1))
    ranks = [list(SequenceLoader(reader, 4, 2 * per_epoch, 1, rank, world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {2 * per_epoch // world_size}
    together = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert _all_same(together[:per_epoch], alone[:per_epoch])
    second_epoch = [row for batch in together[per_epoch:] for row in _rows(batch)]
    assert len(set(second_epoch)) == 4 * per_epoch


def test_every_rank_has_the_same_state_and_resumes_its_own_part(reader) -> None:
    ranks = [SequenceLoader(reader, 4, 30, 1, rank, 2) for rank in range(2)]
    whole = [list(SequenceLoader(reader, 4, 30, 1, rank, 2)) for rank in range(2)]
    for rank in ranks:
        list(itertools.islice(rank, 6))
    assert ranks[0].state_dict() == ranks[1].state_dict()
    for number in range(2):
        resumed = SequenceLoader(reader, 4, 30, 1, number, 2)
        resumed.load_state_dict(ranks[0].state_dict())
        assert _all_same(list(resumed), whole[number][6:])


@pytest.mark.parametrize(
    ("micro_batch", "seed", "world_size"),
    [
        pytest.param(2, 3, 1, id="another micro-batch"),
        pytest.param(4, 2, 1, id="another seed"),
        pytest.param(4, 3, 3, id="ranks that cut the epochs elsewhere"),
        pytest.param(4, 3, 2, id="in the middle of a step of two ranks"),
    ],
)
def test_a_state_of_another_order_is_refused(reader, micro_batch: int, seed: int, world_size: int) -> None:
    loader = SequenceLoader(reader, 4, 30, seed=3)
    list(itertools.islice(loader, 9))
    other = SequenceLoader(reader, micro_batch, 30, seed, 0, world_size)
    with pytest.raises(
        InputError, match=r"a checkpoint of another data order; found .*'position': 9.* expected .*; restore"
    ):
        other.load_state_dict(loader.state_dict())


def test_a_state_of_another_cache_is_refused(codecs, make_reader, reader, tmp_path) -> None:
    (tmp_path / "shards").rename(tmp_path / "first")
    loader = SequenceLoader(make_reader(codecs[SAMPLED], SIZES[:2]), 4, 30, seed=3)
    with pytest.raises(InputError, match="another data order"):
        SequenceLoader(reader, 4, 30, seed=3).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("micro_batch", "world_size", "fits"), [(41, 1, True), (42, 1, False), (10, 4, True), (11, 4, False)]
)
def test_too_few_sequences_for_one_step_are_refused(reader, micro_batch: int, world_size: int, fits: bool) -> None:
    if fits:
        assert len(list(SequenceLoader(reader, micro_batch, world_size, 0, 0, world_size))) == 1
        return
    with pytest.raises(InputError, match=f"found 41 sequences, expected at least {micro_batch * world_size}"):
        SequenceLoader(reader, micro_batch, world_size, 0, 0, world_size)


def test_sampled_weights_are_the_counts_over_the_draws(codecs, make_block) -> None:
    block = make_block(codecs[SAMPLED], 4)
    batch = collate([(block.sequences, block.targets, row) for row in (2, 0, 3)], 20)
    dense_NV = torch.zeros(36, 300).scatter_add_(1, batch.ids_NK, batch.weights_NK)
    # at most 20 counts of 1/20 in float32: each rounds by 3e-9, their sum by 6e-8 a step
    torch.testing.assert_close(batch.weights_NK.sum(-1), torch.ones(36), rtol=0, atol=2e-6)
    assert batch.tail_N is None
    assert batch.ids_NK.shape[1] == block.targets.num_ids_BL[[2, 0, 3]].max()
    targets, place = block.targets, 0
    expected_BLV = np.zeros((4, 12, 300), np.float32)
    for sequence, position in itertools.product(range(4), range(12)):
        part = slice(place, place + targets.num_ids_BL[sequence, position])
        expected_BLV[sequence, position, targets.ids_D[part]] = targets.counts_D[part] / np.float32(20)
        place = part.stop
    assert torch.equal(dense_NV, torch.from_numpy(expected_BLV[[2, 0, 3]].reshape(36, 300)))


def test_topk_weights_are_probabilities_and_the_tail_is_the_rest(codecs, make_block) -> None:
    block = make_block(codecs[TOPK], 4)
    batch = collate([(block.sequences, block.targets, row) for row in (3, 1)], 8)
    assert torch.equal(batch.ids_NK, torch.from_numpy(block.targets.ids_BLK[[3, 1]].reshape(24, 8)).long())
    # each row is divided by its sum, which is 1 but for rounding
    weights_NK = torch.from_numpy(block.targets.logprobs_BLK[[3, 1]].reshape(24, 8)).exp()
    torch.testing.assert_close(batch.weights_NK, weights_NK, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        batch.tail_N, torch.from_numpy(block.targets.tail_BL[[3, 1]].reshape(24)), rtol=1e-5, atol=0
    )
    # 300 probabilities of a float32 softmax, summed in two parts
    torch.testing.assert_close(batch.weights_NK.sum(-1) + batch.tail_N, torch.ones(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [SEQUENCES, SAMPLED, TOPK])
def test_labels_are_the_next_tokens_and_are_ignored_where_the_mask_says_so(codecs, make_block, name: str) -> None:
    block = make_block(codecs[name], 4)
    chosen = [1, 1, 3]
    batch = collate([(block.sequences, block.targets, row) for row in chosen], codecs[name].num_ids)
    tokens_BL1, mask_BL1 = block.sequences.tokens_BL1[chosen], block.sequences.mask_BL1[chosen]
    assert batch.num_tokens == 3 * 12
    for sequence, position in itertools.product(range(3), range(12)):
        assert batch.input_ids_BL[sequence, position] == tokens_BL1[sequence, position]
        expected = tokens_BL1[sequence, position + 1] if mask_BL1[sequence, position + 1] else IGNORED_LABEL
        assert batch.labels_BL[sequence, position] == expected
    assert 0 < (batch.labels_BL == IGNORED_LABEL).sum() < batch.num_tokens
    assert (batch.ids_NK is None) is (name == SEQUENCES)


def test_a_batch_moves_as_a_whole(codecs, make_block) -> None:
    block = make_block(codecs[TOPK], 1)
    moved = collate([(block.sequences, block.targets, 0)], 8).to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


def test_blocks_that_leave_the_cache_and_come_back_change_nothing(codecs, make_reader) -> None:
    """More members than the loader keeps decoded, in windows that are smaller than an epoch."""
    reader = make_reader(codecs[SEQUENCES], ((1,) * 300,))
    batches = list(SequenceLoader(reader, 3, 200, seed=0))
    rows = [row for batch in batches[:100] for row in _rows(batch)]
    assert len(set(rows)) == 300
    assert set(rows) == {row for batch in batches[100:] for row in _rows(batch)}
