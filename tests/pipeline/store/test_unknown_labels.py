"""A label's logprob that nobody knows: stored, read on host and device, and no way around the alignment's proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from capgap.pipeline.store import Block, check_alignment, codec_for
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS, Codec
from capgap.pipeline.store.device import DeviceDecoder
from capgap.pipeline.store.stored import read_stored
from capgap.pipeline.store.stored_batch import gather
from capgap.schemas.errors import CorruptError, InputError


@pytest.fixture(params=TOPK_CODECS.values())
def codec(request: pytest.FixtureRequest, codecs: dict[str, Codec]) -> Codec:
    return dataclasses.replace(codecs[request.param], unknown_labels=True)


def forgotten(block: Block) -> Block:
    """The block without the logprobs of labels that are not kept."""
    is_kept_BL = (block.targets.ids_BLK == block.sequences.tokens_BL1[:, 1:, None]).any(axis=2)
    assert is_kept_BL.any() and not is_kept_BL.all()
    labels_BL = np.where(is_kept_BL, block.targets.label_logprobs_BL, np.float32(np.nan))
    return Block(block.sequences, dataclasses.replace(block.targets, label_logprobs_BL=labels_BL))


def test_unknown_labels_come_back_as_unknown_and_the_others_as_they_were(
    codec: Codec, make_block: Callable[..., Block], stored: Callable[..., Block]
) -> None:
    block = forgotten(make_block(codec))
    labels_BL, found_BL = block.targets.label_logprobs_BL, stored(codec, block).targets.label_logprobs_BL
    assert np.array_equal(np.isnan(labels_BL), np.isnan(found_BL))
    known = ~np.isnan(labels_BL)
    # float32 rounding beside the codec's error
    assert np.abs(labels_BL[known] - found_BL[known]).max() <= codec.error.label_nats + 1e-5


def test_an_unknown_label_that_is_kept_is_a_contradiction_on_host_and_device(
    codec: Codec, make_block: Callable[..., Block]
) -> None:
    block = forgotten(make_block(codec))
    check_alignment(block.sequences, block.targets, 0, "here")
    assert first_fault(codec, block) is None
    labels_BL = np.full_like(block.targets.label_logprobs_BL, np.nan)
    wrong = Block(block.sequences, dataclasses.replace(block.targets, label_logprobs_BL=labels_BL))
    with pytest.raises(CorruptError, match="targets are not aligned"):
        check_alignment(wrong.sequences, wrong.targets, 0, "here")
    assert first_fault(codec, wrong) == 7


def first_fault(codec: Codec, block: Block) -> int | None:
    """The number of a batch that a device refuses; it is called 7."""
    stored = read_stored(codec, codec.encode(block.sequences, block.targets), "here")
    decoder = DeviceDecoder(codec, "cpu")
    decoder.decode(gather([(stored, row) for row in range(len(block.sequences))], codec.seq_len, pin=False), 7)
    return decoder.first_fault()


def test_other_codecs_have_none(codec: Codec, make_block: Callable[..., Block]) -> None:
    block = forgotten(make_block(codec))
    without = dataclasses.replace(codec, unknown_labels=False)
    with pytest.raises(InputError, match="not finite"):
        without.encode(block.sequences, block.targets)
    assert "unknown_labels" not in without.settings
    assert codec_for(codec.name, codec.seq_len, codec.settings) == codec
    for name, value in ((SAMPLED, True), (codec.name, False), (codec.name, 1)):
        with pytest.raises(InputError, match="has other settings"):
            codec_for(name, codec.seq_len, codec.settings | {"unknown_labels": value})
