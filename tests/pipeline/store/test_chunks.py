"""Chunks written and read, in batches, rows and samples of a WebDataset pipeline; and what is refused of them."""

from __future__ import annotations

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
from capgap.schemas.records import ChunkTargets, Sequences

L = 12


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
    writer = ShardWriter(folder, folder / "work", "chunks", Codec(CHUNKS, L, 90))
    return ShardReader(folder, writer.shard_set([writer.write(0, [Block(*made)])]))


def test_what_is_left_of_a_chunk_counts_down_to_its_end_and_is_nothing_in_others() -> None:
    ends = np.array([[False, True, True, False, True, False]])
    kept = np.array([[False, True, False, False, True, False]])
    left = left_in_chunk(ChunkTargets(ends, kept, np.zeros(ends.shape, np.float32)))
    assert left.tolist() == [[1, 0, -1, 1, 0, -1]]


def test_chunks_come_back_bit_by_bit_in_batches_samples_and_rows(tmp_path: Path) -> None:
    sequences, targets = made = block()
    reader = shards(tmp_path, made)
    _, read = reader.read(0)
    assert isinstance(read, ChunkTargets)
    for one, other in zip(vars(read).values(), vars(targets).values(), strict=True):
        assert np.array_equal(one, other)
    batch = collate([(sequences, targets, row) for row in (2, 0)], 0)
    assert batch.chunk_left_N is not None and batch.chunk_logprobs_N is not None
    assert batch.chunk_left_N.tolist() == left_in_chunk(targets)[[2, 0]].ravel().tolist()
    samples = list(SampleShape(0).samples_of(sequences, targets, "key", "url"))
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
    with pytest.raises(InputError, match="where none ends"):
        codec.encode(sequences, ChunkTargets(targets.ends_BL & False, targets.kept_BL, targets.logprobs_BL))
    with pytest.raises(InputError, match="no chunk is kept"):
        codec.encode(sequences, ChunkTargets(targets.ends_BL, targets.kept_BL & False, targets.logprobs_BL))
    with pytest.raises(InputError, match="above 0"):
        codec.encode(sequences, ChunkTargets(targets.ends_BL, targets.kept_BL, -targets.logprobs_BL))


def same(one: Batch, other: Batch) -> None:
    for first, second in zip(one.tensors().values(), other.tensors().values(), strict=True):
        assert (first is None) == (second is None)
        assert first is None or second is None or torch.equal(first, second)
