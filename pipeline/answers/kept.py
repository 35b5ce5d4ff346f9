"""Answers on disk: a line each. Whoever only reads them needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capgap.pipeline.store.files import write_atomically
from capgap.schemas.judge_results import Answered


def read_answers(path: Path) -> tuple[Answered, ...]:
    """The lines of an `answers.jsonl`."""
    return tuple(Answered.model_validate_json(line) for line in path.read_bytes().splitlines())


def write_answers(path: Path, answered: Sequence[Answered]) -> None:
    """The file as a whole, or none."""
    write_atomically(path, "".join(one.model_dump_json() + "\n" for one in answered))
