"""Blocks with targets from a real softmax, and shards of them.

Legend: B sequences, L targets a sequence, N = B x L rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from capgap.kernels.sampling import sampled_rows, topk_rows
from capgap.pipeline.store import Batch, Block, SequenceLoader, ShardReader, ShardWriter
from capgap.pipeline.store.codec import SAMPLED, SEQUENCES, TOPK_CODECS, Codec
from capgap.pipeline.store.ranking import RANKING_NAME, Ranking
from capgap.schemas.records import SampledTargets, Sequences, Targets, TopkTargets

SEQ_LEN = 12
VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def codecs() -> dict[str, Codec]:
    """One of each kind, by its name."""
    known = (Codec(SEQUENCES, SEQ_LEN, VOCAB_SIZE), Codec(SAMPLED, SEQ_LEN, VOCAB_SIZE, 20))
    topk = (Codec(name, SEQ_LEN, VOCAB_SIZE, 8) for name in TOPK_CODECS.values())
    return {codec.name: codec for codec in (*known, *topk)}


@pytest.fixture(scope="session")
def ranked_codecs(codecs: dict[str, Codec]) -> dict[str, Codec]:
    """The same with ids ranked in some order, as in every cache."""
    ranking = Ranking(np.random.default_rng(1).permutation(VOCAB_SIZE).astype(np.int32))
    return {name: dataclasses.replace(codec, ranking=ranking) for name, codec in codecs.items()}


@pytest.fixture(scope="session")
def make_block() -> Callable[..., Block]:
    """A block for a codec: half of the next tokens are sampled from the teacher's distribution, the others are any."""

    def make(codec: Codec, num_sequences: int = 5, seed: int = 0) -> Block:
        generator = torch.Generator().manual_seed(seed)
        length, vocab_size = codec.seq_len, codec.vocab_size
        logits_NV = torch.randn(num_sequences * length, vocab_size, generator=generator) * 3
        likely_BL = torch.multinomial(logits_NV.softmax(-1), 1, generator=generator).view(num_sequences, length)
        tokens_BL1 = torch.randint(vocab_size, (num_sequences, length + 1), generator=generator)
        from_teacher_BL = torch.rand(num_sequences, length, generator=generator) < 0.5
        tokens_BL1[:, 1:] = likely_BL.where(from_teacher_BL, tokens_BL1[:, 1:])
        random_BL1 = torch.rand(num_sequences, length + 1, generator=generator).numpy()
        sequences = Sequences(tokens_BL1.to(torch.int32).numpy(), random_BL1 < 0.2, random_BL1 < 0.7)
        return Block(sequences, targets_of(codec, logits_NV, tokens_BL1[:, 1:], generator))

    return make


def targets_of(
    codec: Codec, logits_NV: torch.Tensor, labels_BL: torch.Tensor, generator: torch.Generator
) -> Targets | None:
    if codec.name == SEQUENCES:
        return None
    shape, labels_N = tuple(labels_BL.shape), labels_BL.reshape(-1)
    if codec.name in TOPK_CODECS.values():
        kept = topk_rows(logits_NV, labels_N, codec.num_ids, codec.temperature, powers=codec.powers)
        return TopkTargets(
            kept.ids_NK.view(*shape, -1).numpy(),
            kept.logprobs_NK.view(*shape, -1).numpy(),
            kept.tail_N.view(shape).numpy(),
            kept.label_logprobs_N.view(shape).numpy(),
            kept.log_tails_NT.view(*shape, -1).numpy(),
        )
    drawn = sampled_rows(logits_NV, labels_N, torch.rand(len(labels_N), generator=generator), codec.num_ids)
    rows = [np.unique(samples_n, return_counts=True) for samples_n in drawn.samples_Nn.numpy()]
    return SampledTargets(
        np.array([len(ids) for ids, _ in rows], np.int32).reshape(shape),
        np.concatenate([ids for ids, _ in rows]).astype(np.int32),
        np.concatenate([counts for _, counts in rows]).astype(np.int32),
        drawn.label_logprobs_N.view(shape).numpy(),
    )


@pytest.fixture(scope="session")
def stored() -> Callable[[Codec, Block], Block]:
    """A block as its codec gives it back; how far that may be from what was written is tested in test_codec.py."""
    return lambda codec, block: Block(*codec.decode(codec.encode(block.sequences, block.targets), "here"))


@pytest.fixture
def make_reader(tmp_path: Path, make_block: Callable[..., Block]) -> Callable[..., ShardReader]:
    """A reader of shards on disk; `sizes` has a tuple per shard with the sequences of each of its members."""

    def make(codec: Codec, sizes: tuple[tuple[int, ...], ...]) -> ShardReader:
        folder = tmp_path / "shards"
        folder.mkdir()
        if codec.ranking is not None:
            (folder / RANKING_NAME).write_bytes(codec.ranking.data)
        writer = ShardWriter(folder, tmp_path / "sidecars", "targets", codec)
        seeds = itertools.count()
        shards = [writer.write(i, [make_block(codec, n, next(seeds)) for n in of]) for i, of in enumerate(sizes)]
        return ShardReader(folder, writer.shard_set(shards))

    return make


@pytest.fixture(scope="session")
def assert_same() -> Callable[[object, object], None]:
    """Two blocks hold the same arrays, bit for bit and type for type."""

    def check(found: tuple[Sequences, Targets | None], expected: Block) -> None:
        for here, there in zip(found, (expected.sequences, expected.targets), strict=True):
            assert type(here) is type(there)
            if here is None or there is None:
                continue
            for name, array in vars(here).items():
                other = getattr(there, name)
                assert array.dtype == other.dtype and array.shape == other.shape, name
                assert array.tobytes() == other.tobytes(), name

    return check


def rows_of(batch: Batch) -> list[bytes]:
    return [row.numpy().tobytes() for row in batch.input_ids_BL]


def steps_of(ranks: list[SequenceLoader], parts: int = 1) -> list[list[bytes]]:
    """The sequences of each step that these ranks still take, sorted; `parts` micro-batches a step on a rank."""
    streams = [[rows_of(batch) for batch in rank] for rank in ranks]
    assert len({len(stream) for stream in streams}) == 1
    return [
        sorted(row for stream in streams for rows in stream[first : first + parts] for row in rows)
        for first in range(0, len(streams[0]), parts)
    ]


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("capgap-decode")]
