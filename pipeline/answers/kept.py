"""Read and write the answers on disk, one per line, without needing a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capgap.pipeline.store.files import write_atomically
from capgap.schemas.judge_results import Answered


def read_answers(path: Path) -> tuple[Answered, ...]:
    """Read the answers of an `answers.jsonl`."""
    return tuple(Answered.model_validate_json(line) for line in path.read_bytes().splitlines())


def write_answers(path: Path, answered: Sequence[Answered]) -> None:
    """Write the answers to a file atomically."""
    write_atomically(path, "".join(one.model_dump_json() + "\n" for one in answered))
