"""Data about the law that people share: rows of their own grids with provenance, and results published in papers."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record
from capgap.schemas.law import LawRun


class LawSubmission(Record):
    """The rows of one grid, with their provenance, as `capgap law submit` writes them."""

    format: Literal["capgap-law-submission-1"] = "capgap-law-submission-1"
    """Name and version of this file format."""

    name: str
    """Name of the grid."""

    machine: str
    """The processor or GPU of the machine that wrote the file."""

    versions: tuple[dict[str, str], ...]
    """Versions of Python and packages from the manifests; equal sets are listed once."""

    manifests: dict[str, str]
    """SHA-256 digest of every manifest of the grid, by its path in the grid's folder."""

    rows: tuple[LawRun, ...] = Field(min_length=1)
    """The rows of the grid's table."""


class PublishedTeacher(Record):
    """One teacher of a published result."""

    size: float = Field(gt=0)
    """Number of parameters."""

    score: float | None = None
    """Score of the student distilled from this teacher, if it was published."""


class PublishedResult(Record):
    """One student that a paper distilled from several teachers."""

    source: str = Field(min_length=1)
    """The paper, and the table or section in it."""

    student: str = Field(min_length=1)
    """Name of the student."""

    student_size: float = Field(gt=0)
    """Number of the student's parameters."""

    tokens: float | None = Field(None, gt=0)
    """Number of tokens that the student was trained on, if it was published."""

    measure: str
    """Meaning of the scores, for example `mean of six benchmarks`."""

    teachers: dict[str, PublishedTeacher] = Field(min_length=2)
    """The teachers by name."""

    best: str
    """Name of the teacher that the paper found best."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best not in self.teachers:
            raise ValueError(f"best: found {self.best!r}, expected one of {', '.join(self.teachers)}")
        scores = [teacher.score for teacher in self.teachers.values()]
        known = [score for score in scores if score is not None]
        if known and (len(known) < len(scores) or self.teachers[self.best].score not in (min(known), max(known))):
            raise ValueError(f"teachers: found the scores {scores}, expected all or none, the best at an end of them")
        return self


class PublishedResults(Record):
    """The file that `capgap law fit --public` reads."""

    results: tuple[PublishedResult, ...] = Field(min_length=1)
    """The results, one student each."""
