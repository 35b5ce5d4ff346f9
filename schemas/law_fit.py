"""`law.json`: what a table of the law of capacity gap says, curve by curve. Its page and its advice are made of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from capgap.schemas.base import Record
from capgap.schemas.law import Init
from capgap.schemas.results import Interval

LAW_NAME = "law.json"

Size = Literal["total", "non_embedding"]
AxisName = Literal["size", "cross_entropy"]
Verdict = Literal["interior", "saturating", "edge", "flat"]
Accounting = Literal["paper", "shared", "everything"]


class TeacherPoint(Record):
    """One teacher of a curve; means are over the curve's complete seeds."""

    name: str
    """Of the teacher."""

    size: int
    """Parameters, counted as the fit counts them."""

    teacher_loss: float
    """The teacher's own cross-entropy, nats per token."""

    loss: float
    """The student's, nats per token."""

    above_best: float
    """Loss minus that of the curve's best teacher, paired by seed."""

    above_best_interval: Interval
    """95 % for this pair of teachers, from the noise that is left once seeds are paired; the choice of the best among
    several is not in it."""

    gain: float
    """Loss of the supervised arm minus loss: positive is good."""

    gain_interval: Interval
    """95 %, Student's t over the paired seeds."""

    within_delta: bool
    """Whether the loss is at most delta above the best."""


class FormFit(Record):
    """One form on one axis."""

    name: str
    """Of the form."""

    formula: str
    """In u, 0 at the smallest and 1 at the largest teacher."""

    leave_one_out: float | None
    """Root of the mean squared error with which it foretells a teacher that was left out, nats; None where there are
    too few teachers for it."""

    losses: tuple[float, ...]
    """The fitted curve at the axis's places; none where it was not fitted."""


class Best(Record):
    """Where an interior curve is lowest."""

    value: float
    """Parameters, or the teacher's cross-entropy in nats per token."""

    interval: Interval
    """Over noise, form and teachers left out; within the bracket."""

    bracket: Interval
    """The nearest teachers on both sides that are worse beyond noise: holds the lowest point of any curve with one
    valley, whatever its form."""

    forms: dict[str, float]
    """Share of the resampled fits in which each form with a valley foretold a left-out teacher best."""


class AxisFit(Record):
    """A curve over one axis."""

    axis: AxisName
    """`size`: logarithm of the teacher's parameters. `cross_entropy`: minus the teacher's loss."""

    verdict: Verdict
    """As `capgap.pipeline.law.verdict` defines it."""

    reason: str
    """Why, in words."""

    best: Best | None
    """For an interior curve."""

    chosen: str
    """The form that foretells a left-out teacher best."""

    forms: tuple[FormFit, ...]
    """All that were tried."""

    places: tuple[float, ...]
    """Of the fitted curves: parameters, or nats per token."""


class Prediction(Record):
    """What a published law says of this student."""

    law: str
    """Its name."""

    source: str
    """Where it was published."""

    validity: str
    """What it was measured on."""

    within_validity: bool
    """Whether this student, these teachers and these tokens lie in there."""

    best_size: float | None
    """Parameters of the best teacher; None where the law cannot say."""

    said: str
    """The prediction in words, with what it rests on."""

    losses: dict[str, float] = Field(default_factory=dict)
    """Predicted loss of the student by teacher, nats per token, for a law that gives one."""

    disagreement: str = ""
    """How it stands to the measurement, or to the other laws."""


class CurveFit(Record):
    """One student, budget, alpha and init, over all its teachers."""

    student: str
    """Name."""

    student_size: int
    """Parameters, counted as the fit counts them."""

    budget: str
    """Name."""

    tokens: int
    """Of the student's training."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Of the first weights."""

    seeds: tuple[int, ...]
    """Those for which every teacher's run and the supervised one are there."""

    left_out_seeds: tuple[int, ...]
    """Those for which one is missing: no run of theirs is in any mean."""

    left_out_teachers: tuple[str, ...]
    """Those without a single finished run here."""

    supervised_loss: float | None
    """Mean of the supervised arm, nats per token; None with a pruned init, where each teacher has its own."""

    noise: float | None
    """Standard deviation of a run once its seed and its teacher are taken away, nats."""

    delta: float | None
    """Difference below which teachers count as equally good, nats."""

    points: tuple[TeacherPoint, ...]
    """By size."""

    axes: tuple[AxisFit, ...]
    """Size, then cross-entropy; none where the curve could not be judged."""

    refused: str | None
    """Why it could not be judged."""

    notes: tuple[str, ...]
    """What a reader must know of it."""

    predictions: tuple[Prediction, ...]
    """Of the published laws."""

    @property
    def title(self) -> str:
        """How people call it."""
        return f"{self.student}, {self.budget}, alpha {self.alpha:g}, {self.init} init"

    def axis(self, name: AxisName) -> AxisFit | None:
        """The fit over an axis."""
        return next((axis for axis in self.axes if axis.axis == name), None)


class Estimate(Record):
    """A coefficient."""

    value: float
    """Fitted."""

    interval: Interval
    """95 % over the students' own intervals, and over leaving each of them out."""


class GlobalLaw(Record):
    """Best teacher as a function of the student, over the interior curves of one budget, alpha and init."""

    budget: str
    """Name."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Of the first weights."""

    students: tuple[str, ...]
    """The interior ones."""

    refused: str | None
    """Why there is no law; the rest is then None."""

    min_size: int | None = None
    """Of the smallest student."""

    max_size: int | None = None
    """Of the largest student."""

    proportional: Estimate | None = None
    """k of T = k S."""

    slope: Estimate | None = None
    """a of T = a S + b."""

    intercept: Estimate | None = None
    """b of T = a S + b, parameters."""

    r_squared: float | None = None
    """Of that line, unweighted."""

    exponent: Estimate | None = None
    """q of T = c S^q."""

    log_factor: float | None = None
    """ln c."""

    said: tuple[str, ...] = ()
    """What it says of exponent 1 and of the published slope."""


class FrontierPoint(Record):
    """One setting of the grid at its cost."""

    name: str
    """Student, teacher, budget, alpha, init."""

    flops: float
    """Floating-point operations under the accounting."""

    loss: float
    """Mean over all seeds of its student, nats per token."""

    num_seeds: int
    """Behind it."""

    supervised: bool
    """Without a teacher."""

    on_frontier: bool
    """No other point costs as little or less and is better, or is as good and costs less."""


class Frontier(Record):
    """Compute against quality."""

    accounting: Accounting
    """Its name."""

    stated: str
    """What is counted."""

    points: tuple[FrontierPoint, ...]
    """By cost."""

    left_out: tuple[str, ...]
    """Settings without a point, each with the reason."""


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
    """By init, alpha, budget and student."""

    laws: tuple[GlobalLaw, ...]
    """One for each budget, alpha and init."""

    frontiers: tuple[Frontier, ...]
    """One for each accounting."""
