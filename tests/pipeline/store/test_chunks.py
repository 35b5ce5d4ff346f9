"""Chunks written and read, in batches, rows and samples of a WebDataset pipeline; and what is refused of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from capgap.pipeline.store import Block, Codec, LoaderSettings, SequenceLoader, ShardReader, ShardWriter
from capgap.pipeline.store.batch import Batch, collate
from capgap.pipeline.store.chunks import left_in_chunk
from capgap.pipeline.store.codec import CHUNKS
from capgap.pipeline.store.samples import SampleShape, collate_samples
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.records import ChunkTargets, ProjectedTargets, Sequences

L = 12


def assert_same(read: ChunkTargets, targets: ChunkTargets) -> None:
    for name in ("ends_BL", "kept_BL", "logprobs_BL"):
        assert np.array_equal(getattr(read, name), getattr(targets, name))
    assert (read.projected is None) == (targets.projected is None)
    if read.projected is not None and targets.projected is not None:
        for one, other in zip(vars(read.projected).values(), vars(targets.projected).values(), strict=True):
            assert np.array_equal(one, other)


def projected(sequences: Sequences, targets: ChunkTargets) -> ChunkTargets:
    """With top-2 tokens at kept chunks of one token: the label, and one more."""
    begins_BL = np.ones_like(targets.ends_BL)
    begins_BL[:, 1:] = targets.ends_BL[:, :-1]
    is_one_BL = begins_BL & targets.kept_BL
    logprobs_BL = np.where(is_one_BL, np.log(np.float32(0.5)), targets.logprobs_BL).astype(np.float32)
    labels_R = sequences.tokens_BL1[:, 1:][is_one_BL]
    ids_R2 = np.stack([labels_R, (labels_R + 1) % 90], axis=1).astype(np.int32)
    logprobs_R2 = np.broadcast_to(np.log(np.array([0.5, 0.375], np.float32)), ids_R2.shape)
    made = ProjectedTargets(
        2 * is_one_BL.astype(np.int32), ids_R2.ravel(), logprobs_R2.ravel(), is_one_BL * np.float32(0.125)
    )
    return replace(targets, logprobs_BL=logprobs_BL, projected=made)


def block(num_sequences: int = 4) -> tuple[Sequences, ChunkTargets]:
    rng = np.random.default_rng(1)
    tokens_BL1 = rng.integers(0, 90, (num_sequences, L + 1)).astype(np.int32)
    starts_BL1 = np.zeros(tokens_BL1.shape, np.bool_)
    mask_BL1 = np.ones(tokens_BL1.shape, np.bool_)
    ends_BL = rng.random((num_sequences, L)) < 0.6
    ends_BL[:, -1] = False
    kept_BL = ends_BL & (rng.random(ends_BL.shape) < 0.7)
    logprobs_BL = np.where(kept_BL, -rng.random(ends_BL.shape) * 30, 0).astype(np.float32)
    return Sequences(tokens_BL1, starts_BL1, mask_BL1), ChunkTargets(ends_BL, kept_BL, logprobs_BL)


def shards(folder: Path, made: tuple[Sequences, ChunkTargets]) -> ShardReader:
    num_ids = 0 if made[1].projected is None else 2
    writer = ShardWriter(folder, folder / "work", "chunks", Codec(CHUNKS, L, 90, num_ids))
    return ShardReader(folder, writer.shard_set([writer.write(0, [Block(*made)])]))


def test_what_is_left_of_a_chunk_counts_down_to_its_end_and_is_nothing_in_others() -> None:
    ends = np.array([[False, True, True, False, True, False]])
    kept = np.array([[False, True, False, False, True, False]])
    left = left_in_chunk(ChunkTargets(ends, kept, np.zeros(ends.shape, np.float32)))
    assert left.tolist() == [[1, 0, -1, 1, 0, -1]]


@pytest.mark.parametrize("is_projected", [False, True])
def test_chunks_come_back_bit_by_bit_in_batches_samples_and_rows(tmp_path: Path, is_projected: bool) -> None:
    sequences, targets = block()
    made = (sequences, projected(sequences, targets) if is_projected else targets)
    targets = made[1]
    reader = shards(tmp_path, made)
    _, read = reader.read(0)
    assert isinstance(read, ChunkTargets)
    assert_same(read, targets)
    batch = collate([(sequences, targets, row) for row in (2, 0)], 0)
    assert batch.chunk_left_N is not None and batch.chunk_logprobs_N is not None
    assert batch.chunk_left_N.tolist() == left_in_chunk(targets)[[2, 0]].ravel().tolist()
    samples = list(SampleShape(reader.codec.num_ids).samples_of(sequences, targets, "key", "url"))
    same(collate_samples([samples[2], samples[0]]), batch)
    loader = SequenceLoader(reader, LoaderSettings(4, seed=0, row_len=2 * L + 3))
    rows = loader.micro_batch(0)
    whole = SequenceLoader(reader, LoaderSettings(4, seed=0)).micro_batch(0)
    assert rows.chunk_left_N is not None and whole.chunk_left_N is not None
    assert torch.equal(rows.chunk_left_N.view(2, -1)[:, : 2 * L].flatten(), whole.chunk_left_N)
    assert (rows.chunk_left_N.view(2, -1)[:, 2 * L :] == -1).all()
    state = loader.state_dict()
    next(iter(loader))
    loader.load_state_dict(state)
    same(next(iter(loader)), rows)


def test_a_device_refuses_to_decode_chunks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not decode chunks"):
        SequenceLoader(shards(tmp_path, block()), LoaderSettings(2, seed=0, decode_on="cpu"))


def test_a_kept_chunk_with_a_target_that_is_no_label_is_damage(tmp_path: Path) -> None:
    sequences, targets = block()
    sequence, place = (int(one[0]) for one in np.nonzero(targets.kept_BL))
    sequences.mask_BL1[sequence, place + 1] = False
    with pytest.raises(CorruptError, match="not aligned"):
        shards(tmp_path, (sequences, targets)).read(0)


def test_what_contradicts_itself_is_not_written() -> None:
    sequences, targets = block()
    codec = Codec(CHUNKS, L, 90)
    with pytest.raises(InputError, match="where no chunk ends"):
        codec.encode(sequences, ChunkTargets(targets.ends_BL & False, targets.kept_BL, targets.logprobs_BL))
    with pytest.raises(InputError, match="no chunk is kept"):
        codec.encode(sequences, ChunkTargets(targets.ends_BL, targets.kept_BL & False, targets.logprobs_BL))
    with pytest.raises(InputError, match="above 0"):
        codec.encode(sequences, ChunkTargets(targets.ends_BL, targets.kept_BL, -targets.logprobs_BL))


def test_projected_targets_that_contradict_their_tokens_or_themselves_are_refused(tmp_path: Path) -> None:
    sequences, plain = block()
    targets = projected(sequences, plain)
    found = targets.projected
    assert found is not None
    codec = Codec(CHUNKS, L, 90, 2)
    for changed, what in [
        (replace(found, ids_D=found.ids_D * 0), "twice"),
        (replace(found, logprobs_D=found.logprobs_D[::-1].copy()), "rise"),
        (replace(found, tail_BL=found.tail_BL * 4), "do not sum to 1"),
        (replace(found, num_ids_BL=found.num_ids_BL[:, ::-1].copy()), "without a target|not belong to a kept chunk"),
    ]:
        with pytest.raises(InputError, match=what):
            codec.encode(sequences, replace(targets, projected=changed))
    with pytest.raises(InputError, match="projected"):
        codec.encode(sequences, plain)
    # a shift by one row: the label's own logprob is another than the chunk's
    shifted = replace(targets, logprobs_BL=np.where(targets.kept_BL, np.float32(-3), np.float32(0)))
    with pytest.raises(CorruptError, match="not aligned"):
        shards(tmp_path, (sequences, shifted)).read(0)


def same(one: Batch, other: Batch) -> None:
    for first, second in zip(one.tensors().values(), other.tensors().values(), strict=True):
        assert (first is None) == (second is None)
        assert first is None or second is None or torch.equal(first, second)
