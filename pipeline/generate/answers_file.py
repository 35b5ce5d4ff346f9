"""The answers beside a shard, as Parquet: where each stands in the rows, how it ended, and the writer's own logprobs.

    student-000000.tar               rows of whole answers, each behind its prompt
    student-000000.answers.parquet   a line an answer: prompt, sample, row, first, finish, reference, text, logprobs

Answer tokens are `tokens_BL1[row, first : first + len(logprobs)]`.
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
# of which the logprobs are held in memory: more than a loader reads from at a time
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
    """An answer and its place.

    Attributes:
        prompt: its number among all prompts.
        sample: which of the prompt's answers.
        row: of the shard; -1 for one that was left out.
        first: where in the row its first token stands.
        finish: `stop` where the writer ended it, `length` where it was cut off, `empty` or `unknown` where it was left
            out.
        right: whether it is the right answer; None where nobody knows that.
        text: without special tokens.
        logprobs: the writer's own of each token, at temperature 1 and over its whole vocabulary.
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
    """Write the file; the same answers give the same bytes."""
    table = pa.Table.from_pylist([vars(one) for one in answers], schema=_SCHEMA)
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd")
    return FileEntry(path=path.name, num_bytes=path.stat().st_size, sha256=sha256_of(path))


def read_answers(path: Path) -> list[Written]:
    """The answers of a file."""
    return [Written(**line) for line in pq.read_table(path, schema=_SCHEMA).to_pylist()]


class WriterLogprobs:
    """By which logprob each label of a text was sampled, for a loader: float32 for every target of the shards in use.

    Args:
        folder: of the text.
        shards: one of its splits.
    """

    def __init__(self, folder: Path, shards: ShardSet) -> None:
        self._folder, self._shards = folder, shards
        self._of_shard = lru_cache(_SHARDS_HELD)(self._read)

    def __call__(self, shard: int, row: int) -> FloatArray:
        """Those of the labels of a row [L], by its shard and its number there; NaN where there is no label."""
        found: FloatArray = self._of_shard(shard)[row, 1:]
        return found

    def _read(self, shard: int) -> FloatArray:
        entry = self._shards.shards[shard]
        logprobs_BL1 = np.full((entry.num_sequences, self._shards.seq_len + 1), np.nan, np.float32)
        for one in read_answers(self._folder / f"{entry.file.path.removesuffix('.tar')}{SUFFIX}"):
            if one.row >= 0:
                logprobs_BL1[one.row, one.first : one.first + len(one.logprobs)] = one.logprobs
        return logprobs_BL1
