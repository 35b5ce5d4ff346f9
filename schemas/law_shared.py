"""What people share of the law: their grid's rows with where they come from, and points that papers have published."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from capgap.schemas.base import Record
from capgap.schemas.law import LawRun


class LawSubmission(Record):
    """The rows of one grid, with their provenance, as `capgap law submit` writes them."""

    format: Literal["capgap-law-submission-1"] = "capgap-law-submission-1"
    """What this file is."""

    name: str
    """The grid's."""

    machine: str
    """The processor or GPU of the machine that wrote the file."""

    versions: tuple[dict[str, str], ...]
    """Of Python and the packages that took part, as the manifests have them; each set once."""

    manifests: dict[str, str]
    """sha256 of every manifest of the grid, by its path in the grid's folder."""

    rows: tuple[LawRun, ...] = Field(min_length=1)
    """The table."""


class PublishedTeacher(Record):
    """One teacher of a published result."""

    size: float = Field(gt=0)
    """Parameters."""

    score: float | None = None
    """What the student reached from it, where that was printed."""


class PublishedResult(Record):
    """One student that a paper distilled from several teachers."""

    source: str = Field(min_length=1)
    """The paper, and where in it."""

    student: str = Field(min_length=1)
    """Its name."""

    student_size: float = Field(gt=0)
    """Parameters."""

    tokens: float | None = Field(None, gt=0)
    """That it was trained on, where that was printed."""

    measure: str
    """What was compared, for example `mean of six benchmarks`."""

    teachers: dict[str, PublishedTeacher] = Field(min_length=2)
    """By name."""

    best: str
    """The one that the paper found best."""

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
    """One student each."""
