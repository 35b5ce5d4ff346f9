"""Legend: B sequences, L targets a sequence, N = B x L rows, K ids of the widest row."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from capgap.pipeline.store.batch import IGNORED_LABEL, collate
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK, TOPK_CODECS
from capgap.pipeline.store.rows import in_rows
from capgap.schemas.records import TopkTargets


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
    batch = in_rows(collate([(block.sequences, block.targets, 0)], 8), 12)
    moved = batch.to("meta").tensors()
    there = {name for name, tensor in batch.tensors().items() if tensor is not None}
    assert {"ids_NK", "weights_NK", "tail_N", "labels_BL", "positions_BL"} <= there
    assert {name for name, tensor in moved.items() if tensor is not None and tensor.device.type == "meta"} == there


@pytest.mark.parametrize("name", [SAMPLED, *TOPK_CODECS.values()])
def test_every_row_is_one_distribution_however_it_was_stored(codecs, make_block, stored, name: str) -> None:
    block = stored(codecs[name], make_block(codecs[name]))
    batch = collate([(block.sequences, block.targets, row) for row in (3, 0)], codecs[name].num_ids)
    total_N = batch.weights_NK.sum(dim=1) + (0 if batch.tail_N is None else batch.tail_N)
    # float32 sums of some twenty numbers
    assert torch.allclose(total_N, torch.ones_like(total_N), atol=1e-6)
    assert batch.weights_NK.dtype == torch.float32 and batch.ids_NK.dtype == torch.int64


def test_padding_of_a_stored_row_has_weight_0(codecs, make_block, stored) -> None:
    codec = dataclasses.replace(codecs[TOPK_CODECS["small"]], num_ids=250)
    block = stored(codec, make_block(codec))
    assert isinstance(block.targets, TopkTargets)
    batch = collate([(block.sequences, block.targets, 1)], codec.num_ids)
    padding_NK = np.isneginf(block.targets.logprobs_BLK[1])
    assert padding_NK.any()
    assert ((batch.weights_NK.numpy() == 0) == padding_NK).all()
    assert (batch.ids_NK.numpy()[padding_NK] == 0).all()
