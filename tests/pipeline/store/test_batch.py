"""Legend: B sequences, L targets a sequence, N = B x L rows, K ids of a row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS
from capgap.schemas.records import TopkTargets


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
