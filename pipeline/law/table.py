"""Reads and writes the table of runs, and refuses rows that are not comparable in one grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.store.files import write_atomically
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.law import LawModel, LawRun, LawTeacher


def read_table(path: Path) -> tuple[LawRun, ...]:
    """Read the rows of a table of JSON lines, and check them by :func:`check`.

    Raises:
        InputError: The file is missing or empty, a line is not a row, a run is in the table twice, or there is no
            supervised or no distilled run.
        MismatchError: The rows are not comparable in one grid.
    """
    try:
        # split at line feeds only, because JSON texts may contain other line separators, such as U+2028
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("no such table", where=path, expected="a file of JSON lines, one a run") from None
    except UnicodeDecodeError:
        raise InputError("not a table", where=path, found="bytes that are no text", expected="JSON lines") from None
    runs = tuple(_row(path, i, line) for i, line in enumerate(lines, 1) if line.strip())
    if not runs:
        raise InputError("the table is empty", where=path, expected="one line a run")
    check(runs, path)
    return runs


def write_table(path: Path, runs: Iterable[LawRun]) -> None:
    """Write the rows as JSON lines, in the order given."""
    write_atomically(path, "".join(f"{run.model_dump_json()}\n" for run in runs))


def check(runs: Sequence[LawRun], where: object) -> None:
    """Refuse rows that are not comparable in one grid.

    Args:
        runs: The rows.
        where: Source of the rows, for errors.

    Raises:
        InputError: A run is in the table twice, or there is no supervised or no distilled run.
        MismatchError: Recordings or settings that must be equal differ, or two models have the same name.
    """
    _refuse_repeated(runs, where)
    _equal(
        [run for run in runs if run.cache is not None],
        fact=lambda run: run.cache.kept if run.cache else "",
        what="caches of different recordings in one grid",
        where=where,
        fix="record all teachers alike: what a recording leaves out looks like an effect of the teacher",
    )
    for setting in sorted(set(chain.from_iterable(run.common for run in runs))):
        _equal(runs, partial(_common, setting), f"{setting} differs within one grid", where)
    for group in _grouped(runs, lambda run: (run.student.name, run.budget)):
        _equal(group, lambda run: str(run.tokens), "tokens differ within one student and budget", where)
        for setting in sorted(set(chain.from_iterable(run.per_student for run in group))):
            _equal(group, partial(_per_student, setting), f"{setting} differs within one student and budget", where)
    for students in _grouped(runs, lambda run: run.student.name):
        _equal(students, lambda run: _sizes(run.student), "one name for two students", where)
    for taught in _grouped([run for run in runs if run.teacher], lambda run: run.teacher and run.teacher.name):
        _equal(taught, lambda run: _sizes(run.teacher) if run.teacher else "", "one name for two teachers", where)
    if all(run.teacher is not None for run in runs):
        raise InputError("no supervised run (alpha 0, no teacher)", where=where, fix="add that arm to the grid")
    if all(run.teacher is None for run in runs):
        raise InputError("no distilled run", where=where, fix="add runs with teachers to the grid")


def _row(path: Path, number: int, line: str) -> LawRun:
    try:
        return LawRun.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{setting}: {reason}" if setting else reason, where=f"{path}, line {number}", fix="see docs/law.md"
        ) from None


def _refuse_repeated(runs: Sequence[LawRun], where: object) -> None:
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise InputError("one run stands in the table twice", where=where, found=run.name, expected="one row a run")
        seen.add(run.name)


def _equal(
    runs: Sequence[LawRun], fact: Callable[[LawRun], str], what: str, where: object, fix: str | None = None
) -> None:
    """Refuse runs that differ in a fact; the error names two of them."""
    for run in runs[1:]:
        if fact(run) != fact(runs[0]):
            raise MismatchError(
                what,
                where=where,
                found=f"{fact(run)} ({run.name})",
                expected=f"{fact(runs[0])} ({runs[0].name})",
                fix=fix,
            )


def _grouped(runs: Iterable[LawRun], key: Callable[[LawRun], object]) -> list[list[LawRun]]:
    groups: dict[object, list[LawRun]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _common(setting: str, run: LawRun) -> str:
    return repr(run.common[setting]) if setting in run.common else "nothing"


def _per_student(setting: str, run: LawRun) -> str:
    return repr(run.per_student[setting]) if setting in run.per_student else "nothing"


def _sizes(model: LawModel) -> str:
    sizes = f"{model.num_parameters} parameters, {model.num_non_embedding_parameters} without embedding"
    return f"{sizes}, loss {model.loss!r}, {model.train_tokens} tokens" if isinstance(model, LawTeacher) else sizes
