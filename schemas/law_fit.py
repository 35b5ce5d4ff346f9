"""`law.json`: the fit to a table of the law of capacity gap, from which the page and the advice are made."""

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
    """A fitted coefficient with its interval."""

    value: float
    """The fitted value."""

    interval: Interval
    """The 95 % interval over the students' own intervals, and over leaving each student out."""


Measure = Literal["teacher's loss", "teacher's loss over the student's alone", "gap in loss", "initial KL"]
"""`gap in loss`: the student's loss without a teacher minus the teacher's. `initial KL`: from the teacher to the
untrained student."""


class AxisLaw(Record):
    """How one measure of the best teacher depends on the student."""

    measure: Measure
    """The measure, in nats/token or as a ratio."""

    students: tuple[str, ...]
    """Students whose curve over the axis of this measure is interior."""

    refused: str | None
    """Why there is no law; the other fields are then None."""

    constant: Estimate | None = None
    """Value of the measure if it is the same for all students."""

    per_doubling: Estimate | None = None
    """Change of the measure when the student's size doubles."""


class GlobalLaw(Record):
    """Size T of the best teacher as a function of the student's size S, for one budget, alpha and init."""

    budget: str
    """Name of the budget."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Where the initial weights come from."""

    students: tuple[str, ...]
    """Students whose curve is interior."""

    refused: str | None
    """Why there is no law; the fits are then None."""

    min_size: int | None = None
    """Number of parameters of the smallest student."""

    max_size: int | None = None
    """Number of parameters of the largest student."""

    proportional: Estimate | None = None
    """k of T = k S."""

    slope: Estimate | None = None
    """a of T = a S + b."""

    intercept: Estimate | None = None
    """b of T = a S + b, in parameters."""

    r_squared: float | None = None
    """Share of the variance that the line explains, unweighted."""

    exponent: Estimate | None = None
    """q of T = c S^q."""

    log_factor: float | None = None
    """ln c of T = c S^q."""

    axes: tuple[AxisLaw, ...] = ()
    """Laws of the best teacher in other measures than parameters."""

    remarks: tuple[str, ...] = ()
    """Comparisons with exponent 1 and with the published slope, and how little R^2 means."""


class LawFit(Record):
    """The content of `law.json`."""

    table: str
    """Path of the table that was read."""

    table_sha256: str
    """SHA-256 digest of the table."""

    num_runs: int
    """Number of rows with a result."""

    size: Size
    """Which parameters count as a model's size: all (`total`) or those without embedding and head."""

    kept: str
    """The form in which all caches store distributions, in words."""

    common: dict[str, str]
    """Settings that are equal in all rows."""

    missing: tuple[str, ...]
    """Every run of the grid without a result, with the reason."""

    curves: tuple[CurveFit, ...]
    """The curves, ordered by init, alpha, budget (the one with the most students first) and student."""

    laws: tuple[GlobalLaw, ...]
    """One law for each budget, alpha and init."""

    regrets: tuple[RegretTable, ...]
    """One table of scored rules for choosing a teacher for each budget, alpha and init."""

    frontiers: tuple[Frontier, ...]
    """One frontier for each way of counting compute."""

    added: dict[str, str] = Field(default_factory=dict)
    """SHA-256 digests, by path, of the submissions whose rows were added to the table's."""

    published: tuple[PublishedResult, ...] = ()
    """Results published by papers, if a file of them was given."""

    published_rules: tuple[RuleScore, ...] = ()
    """Scores, on the students of `published`, of the rules that need only sizes. Their regret is the share of students
    for which they miss the best teacher: 1 or 0 for each."""
