"""Read a set of questions in MT-Bench's form, with one JSON object per line."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.store.files import read_small
from capgap.schemas.errors import InputError
from capgap.schemas.judge_results import Question

OWN_QUESTIONS = Path(__file__).with_name("questions.jsonl")


@lru_cache(maxsize=1)
def own_questions_digest() -> str:
    """Return the digest of capgap's own questions, which are asked if a run file names no others."""
    return hashlib.sha256(OWN_QUESTIONS.read_bytes()).hexdigest()[:16]


def read_questions(path: str | None) -> tuple[Question, ...]:
    """Read the questions of a file, or capgap's own if `path` is None.

    Raises:
        InputError: the file is missing or empty, a line is no question, or two questions have the same id.
    """
    where = OWN_QUESTIONS if path is None else Path(path)
    try:
        # split only at line feeds, as JSON strings may contain other line separators unescaped, such as U+2028
        lines = read_small(where).decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError("no such file", where=f"judge.questions: {where}", expected="questions as JSONL") from None
    except UnicodeDecodeError:
        raise InputError("is no text in UTF-8", where=f"judge.questions: {where}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    questions = tuple(_question(line, f"{where}:{number}") for number, line in numbered)
    if not questions:
        raise InputError("holds no question", where=f"judge.questions: {where}", expected="one JSON object per line")
    seen: set[str] = set()
    for (number, _), question in zip(numbered, questions, strict=True):
        if str(question.question_id) in seen:
            raise InputError(
                "two questions have the same question_id", where=f"{where}:{number}", found=question.question_id
            )
        seen.add(str(question.question_id))
    return questions


def _question(line: str, where: str) -> Question:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, no object")
        # other fields are ignored: question files of others have more, such as the model of a reference answer
        known = {name: found[name] for name in Question.model_fields if found.get(name) is not None}
        return Question.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        found = first["msg"].removeprefix("Value error, ")
        text = f"{name}: {found}" if name else found
    except ValueError as error:
        text = str(error)
    raise InputError(
        "is no question", where=where, found=text, expected='{"question_id": ..., "category": ..., "turns": [..., ...]}'
    )
