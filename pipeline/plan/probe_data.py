"""The data of the probes: random tokens, and targets from random logits in place of a teacher's.

Legend: B sequences, L targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from capgap.pipeline.cache.scoring import Recording, Request, Scored, record_rows, row_offsets, unpack
from capgap.pipeline.cache.shards import CacheJob, ShardScorer, recording_of
from capgap.pipeline.store import Block, Codec, ShardReader, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SEQUENCES
from capgap.pipeline.store.ranking import RANKING_NAME, rank_counts
from capgap.schemas.records import IntArray, Sequences
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_file import RunFile

# Standard deviation of the random logits: it gives as many distinct samples per token as a teacher does on text.
_SPREAD = 3.0


def random_tokens(num_sequences: int, seq_len: int, vocab_size: int) -> IntArray:
    """Return uniformly random token ids [B, L + 1], int32."""
    return np.random.default_rng(0).integers(0, vocab_size, (num_sequences, seq_len + 1), np.int32)


def scratch_job(
    run: RunFile, folder: Path, device: str, vocab_size: int, teacher: str, shards: Sequence[IntArray]
) -> CacheJob:
    """Write a corpus of these tokens below `folder`, and return the job of a cache stage over it.

    Args:
        run: The run file.
        folder: Where corpus, cache and work folders are made.
        device: The engine's device.
        vocab_size: Size of the tokenizer's vocabulary.
        teacher: Folder of the teacher's model; empty where the job needs none.
        shards: Token ids of each shard [B, L + 1].
    """
    seq_len = shards[0].shape[1] - 1
    corpus, cache, work = (folder / name for name in ("corpus", "cache", "work"))
    for made in (corpus, cache, work):
        made.mkdir(parents=True)
    writer = ShardWriter(corpus, work / "corpus", "student", Codec(SEQUENCES, seq_len, vocab_size))
    entries = [
        writer.write(number, (Block(part) for part in split_blocks(_one_document(tokens_BL1))))
        for number, tokens_BL1 in enumerate(shards)
    ]
    ranking = rank_counts(np.zeros(vocab_size, np.int64))
    (cache / RANKING_NAME).write_bytes(ranking.data)
    return CacheJob(
        settings=run.cache,
        corpus=corpus,
        source=writer.shard_set(entries),
        num_training=len(entries),
        context=run.corpus.context,
        teacher=teacher,
        folder=cache,
        work=work,
        vocab_size=vocab_size,
        ranking_sha256=ranking.sha256,
        device=device,
        trust_remote_code=run.teacher.trust_remote_code,
    )


class RandomScorer(ShardScorer):
    """Makes a job's shards from random logits instead of the teacher's."""

    def reader(self, recording: RecordingName) -> ShardReader:
        """Make the job's first shard, and return a reader of that recording of it."""
        return ShardReader(self.job.folder, self.shard_set(recording, [self.make(0)]))

    def _start(self) -> _RandomEngine:
        return _RandomEngine(recording_of(self.job))


class _RandomEngine:
    """An engine that records random logits; a repeated sequence gets its first result again."""

    name, dtype = "random", "float32"

    def __init__(self, recording: Recording) -> None:
        self._recording, self._known = recording, dict[bytes, Scored]()

    def score(self, requests: Sequence[Request]) -> list[Scored]:
        """Return the recorded distributions of each request (see `Engine.score`)."""
        for request in requests:
            if request.digest not in self._known:
                self._known[request.digest] = self._scored(request)
        return [self._known[request.digest] for request in requests]

    def close(self) -> None:
        """Do nothing: there is no model to free."""

    def _scored(self, request: Request) -> Scored:
        recording, labels_L = self._recording, torch.from_numpy(request.tokens_L1[1:]).long()
        offsets = row_offsets(recording, request.digest, 0, len(labels_L))
        offsets_L = None if offsets is None else torch.from_numpy(offsets)
        parts = []
        for start in range(0, len(labels_L), recording.chunk_rows):
            rows = slice(start, start + recording.chunk_rows)
            logits_LV = _SPREAD * torch.randn(len(labels_L[rows]), recording.vocab_size)
            parts.append(
                record_rows(recording, logits_LV, labels_L[rows], None if offsets_L is None else offsets_L[rows])
            )
        ids_LC, numbers_LW = (
            torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("ids_NC", "numbers_NW")
        )
        return unpack(recording, ids_LC, numbers_LW, request.name)


def _one_document(tokens_BL1: IntArray) -> Sequences:
    starts_BL1, mask_BL1 = np.zeros(tokens_BL1.shape, np.bool_), np.ones(tokens_BL1.shape, np.bool_)
    starts_BL1[:, 0], mask_BL1[:, 0] = True, False
    return Sequences(tokens_BL1, starts_BL1, mask_BL1)
