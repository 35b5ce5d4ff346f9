"""`law.json`: what follows from a table of the law of capacity gap. Its page and its advice are made of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capgap.schemas.base import Record
from capgap.schemas.law import Init
from capgap.schemas.law_curve import CurveFit, Size
from capgap.schemas.law_frontier import Frontier
from capgap.schemas.law_regret import RegretTable, RuleScore
from capgap.schemas.law_shared import PublishedResult
from capgap.schemas.results import Interval

LAW_NAME = "law.json"


class Estimate(Record):
    """A coefficient."""

    value: float
    """Fitted."""

    interval: Interval
    """95 % over the students' own intervals, and over leaving each of them out."""


Measure = Literal["teacher's loss", "teacher's loss over the student's alone", "gap in loss", "initial KL"]
"""`gap in loss`: the student's loss without a teacher minus the teacher's. `initial KL`: from the teacher to the
untrained student."""


class AxisLaw(Record):
    """A measure at the best teacher, over students."""

    measure: Measure
    """What is measured, nats/token or a ratio."""

    students: tuple[str, ...]
    """The interior ones, over the axis of that measure."""

    refused: str | None
    """Why there is no law; the rest is then None."""

    constant: Estimate | None = None
    """As one value for all students."""

    per_doubling: Estimate | None = None
    """How much it moves when the student doubles."""


class GlobalLaw(Record):
    """Best teacher as a function of the student, over the interior curves of one budget, alpha and init."""

    budget: str
    """Name."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Where the first weights come from."""

    students: tuple[str, ...]
    """The interior ones."""

    refused: str | None
    """Why there is no law; the rest is then None."""

    min_size: int | None = None
    """Parameters of the smallest student."""

    max_size: int | None = None
    """Parameters of the largest student."""

    proportional: Estimate | None = None
    """k of T = k S."""

    slope: Estimate | None = None
    """a of T = a S + b."""

    intercept: Estimate | None = None
    """b of T = a S + b, parameters."""

    r_squared: float | None = None
    """Share of the variance that the line explains, unweighted."""

    exponent: Estimate | None = None
    """q of T = c S^q."""

    log_factor: float | None = None
    """ln c."""

    axes: tuple[AxisLaw, ...] = ()
    """The best teacher in other measures than parameters."""

    remarks: tuple[str, ...] = ()
    """How it stands to exponent 1 and to the published slope, and how little R^2 means."""


class LawFit(Record):
    """Everything in `law.json`."""

    table: str
    """The file that was read."""

    table_sha256: str
    """Its digest."""

    num_runs: int
    """Rows with a result."""

    size: Size
    """Which parameters are counted as size."""

    kept: str
    """What all caches kept of a distribution."""

    common: dict[str, str]
    """Settings that all rows share."""

    missing: tuple[str, ...]
    """Every run of the grid without a result, each with the reason."""

    curves: tuple[CurveFit, ...]
    """By init, alpha and budget, those with the most students first, and student."""

    laws: tuple[GlobalLaw, ...]
    """One for each budget, alpha and init."""

    regrets: tuple[RegretTable, ...]
    """Rules for choosing a teacher, scored: a table for each budget, alpha and init."""

    frontiers: tuple[Frontier, ...]
    """One for each accounting."""

    added: dict[str, str] = Field(default_factory=dict)
    """sha256 of the submissions whose rows have joined the table's, by path."""

    published: tuple[PublishedResult, ...] = ()
    """What papers have published, where a file of it was given."""

    published_rules: tuple[RuleScore, ...] = ()
    """The rules that need sizes alone on those students; their regret is the share for whom they miss the best teacher,
    1 or 0 for each."""
