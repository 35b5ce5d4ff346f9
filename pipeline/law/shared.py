"""Reads and writes shared results: submissions of rows with their provenance, and published results of papers.

Legend: M teachers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError

from capgap.pipeline.law.rules import RULES, Student, is_outside
from capgap.pipeline.law.table import read_table
from capgap.pipeline.stage.device import machine_kind, resolve_device
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store.files import sha256_of, write_atomically
from capgap.schemas.errors import InputError
from capgap.schemas.law import LawRun
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_regret import Choice, RuleScore
from capgap.schemas.law_shared import LawSubmission, PublishedResult, PublishedResults
from capgap.schemas.manifest import MANIFEST_NAME


def write_submission(grid: LawGrid, table: Path, path: Path) -> LawSubmission:
    """Write those rows of a grid's table that have a result, with their provenance, and return them.

    Args:
        grid: The grid.
        table: Path of the grid's table.
        path: Path of the file to write.

    Raises:
        InputError: No run has a result.
    """
    rows = [row for row in read_table(table) if row.loss is not None]
    if not rows:
        raise InputError("no run has a result yet", where=table, fix="make the grid's runs with `capgap law run`")
    out = Path(grid.out)
    found = sorted(out.rglob(MANIFEST_NAME))
    versions = [manifest.versions for one in found if (manifest := read_manifest(one.parent)) is not None]
    submission = LawSubmission(
        name=grid.name,
        machine=machine_kind(resolve_device(grid.device)),
        versions=tuple(one for i, one in enumerate(versions) if one not in versions[:i]),
        manifests={str(one.relative_to(out)): sha256_of(one) for one in found},
        rows=tuple(rows),
    )
    write_atomically(path, submission.model_dump_json(indent=1) + "\n")
    return submission


def read_submission(path: Path) -> LawSubmission:
    """Read the rows of a submission.

    Raises:
        InputError: The file is missing or is not a submission.
    """
    try:
        return LawSubmission.model_validate_json(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("no such submission", where=path, expected="a file of `capgap law submit`") from None
    except ValidationError as error:
        raise InputError("not a submission", where=path, found=error.errors()[0]["msg"]) from None


def joined(runs: Sequence[LawRun], submissions: Sequence[LawSubmission]) -> tuple[LawRun, ...]:
    """Return the rows of a table followed by those of submissions; `table.check` says whether they are comparable."""
    return (*runs, *(row for submission in submissions for row in submission.rows))


def read_published(path: Path) -> PublishedResults:
    """Read a YAML file with results that papers have published.

    Raises:
        InputError: The file is missing or does not hold published results.
    """
    try:
        return PublishedResults.model_validate(yaml.safe_load(path.read_text()))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            "no such file of published results", where=path, expected="YAML, as docs/law.md has it"
        ) from None
    except (ValidationError, yaml.YAMLError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        reason = reason.removeprefix("Value error, ")
        raise InputError("not a file of published results", where=path, found=reason, fix="see docs/law.md") from None


def score_published(results: Sequence[PublishedResult]) -> tuple[RuleScore, ...]:
    """Score the rules that need sizes only, by the share of published students whose best teacher they miss."""
    students = [_student(one) for one in results]
    scores = []
    for rule in RULES:
        if rule.needs_losses or rule.refusal(students) is not None:
            continue
        choices = []
        for student in students:
            chosen = int(rule.choose(student, [other for other in students if other is not student])[0])
            missed = float(student.lost[0, chosen])
            choices.append(Choice(student=student.name, teacher=student.teachers[chosen], regret=missed))
        outside = tuple(one.name for one in students if rule.published and is_outside(rule.published, one))
        missed = math.fsum(choice.regret for choice in choices) / len(choices)
        scores.append(
            RuleScore(name=rule.name, formula=rule.formula, regret=missed, choices=tuple(choices), outside=outside)
        )
    return tuple(sorted(scores, key=lambda score: score.regret or 0.0))


def _student(result: PublishedResult) -> Student:
    """Return a student that loses 0 with its best teacher and 1 with any other, as papers compare different metrics."""
    return Student(
        name=result.student,
        size=result.student_size,
        tokens=int(result.tokens or 1),
        alone=math.nan,
        teachers=tuple(result.teachers),
        sizes_M=np.array([teacher.size for teacher in result.teachers.values()]),
        losses_M=np.full(len(result.teachers), math.nan),
        initial_kl_M=None,
        means_BM=np.array([[float(name != result.best) for name in result.teachers]]),
    )
