"""The answers beside a shard, as Parquet: where each stands in the rows, how it ended, and the writer's own logprobs.

    student-000000.tar               rows of whole answers, each behind its prompt
    student-000000.answers.parquet   a line an answer: prompt, sample, row, first, finish, reference, text, logprobs

Answer tokens are `tokens_BL1[row, first : first + len(logprobs)]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from capgap.pipeline.store.files import atomic_file, sha256_of
from capgap.schemas.manifest import FileEntry

SUFFIX = ".answers.parquet"

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
