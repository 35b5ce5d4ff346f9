"""Reads and writes the answers beside a shard, as Parquet: their places in the rows, how they ended, their logprobs.

    student-000000.tar               rows of whole answers, each behind its prompt
    student-000000.answers.parquet   one line per answer: prompt, sample, row, first, finish, right, text, logprobs

The tokens of an answer are `tokens_BL1[row, first : first + len(logprobs)]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from capgap.pipeline.store.files import atomic_file, sha256_of
from capgap.schemas.manifest import FileEntry, ShardSet
from capgap.schemas.records import FloatArray

SUFFIX = ".answers.parquet"
# the logprobs of so many shards are held in memory, which is more than a loader reads from at a time
_SHARDS_HELD = 128

_SCHEMA = pa.schema(
    [
        ("prompt", pa.int64()),
        ("sample", pa.int32()),
        ("row", pa.int32()),
        ("first", pa.int32()),
        ("finish", pa.string()),
        ("right", pa.bool_()),
        ("text", pa.string()),
        ("logprobs", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Written:
    """An answer and its place in the shard.

    Attributes:
        prompt: number of the prompt among all prompts.
        sample: number of the answer among those to the prompt.
        row: row of the shard that holds the answer; -1 for an answer that is left out.
        first: place of the answer's first token in the row; -1 for an answer that is left out.
        finish: `stop` if the writer ended the answer, `length` if it was cut off; `empty`, or `unknown` (an id is no
            token) if it is left out.
        right: whether the answer is right; None if the prompt has no reference.
        text: the answer without special tokens.
        logprobs: the writer's logprob of each token, nats, at temperature 1 and over its whole vocabulary.
    """

    prompt: int
    sample: int
    row: int
    first: int
    finish: Literal["stop", "length", "empty", "unknown"]
    right: bool | None
    text: str
    logprobs: Sequence[float]


def write_answers(path: Path, answers: Sequence[Written]) -> FileEntry:
    """Write a file of answers, and return its entry for the manifest; the same answers give the same bytes."""
    table = pa.Table.from_pylist([vars(one) for one in answers], schema=_SCHEMA)
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")
    return FileEntry(path=path.name, num_bytes=path.stat().st_size, sha256=sha256_of(path))


def read_answers(path: Path) -> list[Written]:
    """Return the answers of a file."""
    return [Written(**line) for line in pq.read_table(path, schema=_SCHEMA).to_pylist()]


class WriterLogprobs:
    """Gives a loader the logprob with which the writer sampled each label of a generated text.

    Args:
        folder: folder of the generate stage.
        shards: the shards of one of its splits.
    """

    def __init__(self, folder: Path, shards: ShardSet) -> None:
        self._folder, self._shards = folder, shards
        self._of_shard = lru_cache(_SHARDS_HELD)(self._read)

    def __call__(self, shard: int, row: int) -> FloatArray:
        """Return the logprobs of the labels of a shard's row [L], float32, nats; NaN where there is no label."""
        found: FloatArray = self._of_shard(shard)[row, 1:]
        return found

    def _read(self, shard: int) -> FloatArray:
        entry = self._shards.shards[shard]
        logprobs_BL1 = np.full((entry.num_sequences, self._shards.seq_len + 1), np.nan, np.float32)
        for one in read_answers(self._folder / f"{entry.file.path.removesuffix('.tar')}{SUFFIX}"):
            if one.row >= 0:
                logprobs_BL1[one.row, one.first : one.first + len(one.logprobs)] = one.logprobs
        return logprobs_BL1
