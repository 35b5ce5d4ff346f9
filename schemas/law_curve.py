"""The part of `law.json` about one student: its loss over all its teachers, and where that is lowest."""

from __future__ import annotations

from typing import Literal

from capgap.schemas.base import Record
from capgap.schemas.law import Init
from capgap.schemas.law_prediction import Prediction
from capgap.schemas.results import Interval

Size = Literal["total", "non_embedding"]
AxisName = Literal["size", "cross_entropy", "initial_kl"]
Verdict = Literal["interior", "saturating", "edge", "flat"]


class TeacherPoint(Record):
    """One teacher of a curve; means are over the curve's complete seeds."""

    name: str
    """The teacher's name."""

    size: int
    """Parameters, counted as the fit counts them."""

    teacher_loss: float
    """The teacher's own cross-entropy, nats/token."""

    initial_kl: float | None = None
    """KL from it to the untrained student, nats/token; None where that was not measured."""

    loss: float
    """The student's, nats/token."""

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
    """The form's name."""

    formula: str
    """In u, 0 at the smallest and 1 at the largest teacher."""

    leave_one_out: float | None
    """Root of the mean squared error with which it foretells a teacher that was left out, nats; of an interior curve, a
    teacher between the ends. None where there are too few teachers for it."""

    losses: tuple[float, ...]
    """The fitted curve at the axis's places; none where it was not fitted."""


class Best(Record):
    """Where an interior curve is lowest."""

    value: float
    """Parameters, or the teacher's cross-entropy in nats/token."""

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
    """`size`: logarithm of the teacher's parameters. `cross_entropy`: minus the teacher's loss. `initial_kl`: logarithm
    of the KL from the teacher to the untrained student."""

    verdict: Verdict
    """As `capgap.pipeline.law.verdict` defines it."""

    reason: str
    """Why, in words."""

    limit: str | None = None
    """What an interior verdict lacks, in standard errors and in seeds; None for one."""

    best: Best | None
    """For an interior curve."""

    chosen: str
    """The form that foretells a left-out teacher best; of an interior curve, among those with a valley."""

    forms: tuple[FormFit, ...]
    """All that were tried."""

    places: tuple[float, ...]
    """Where the fitted curves are kept: parameters, or nats/token."""

    @property
    def over(self) -> str:
        """The axis, as people call it."""
        return {"size": "size", "cross_entropy": "cross-entropy", "initial_kl": "initial KL"}[self.axis]


class CurveFit(Record):
    """One student, budget, alpha and init, over all its teachers."""

    student: str
    """Name."""

    student_size: int
    """Parameters, counted as the fit counts them."""

    budget: str
    """Name."""

    tokens: int
    """That the student was trained on."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Where the first weights come from."""

    seeds: tuple[int, ...]
    """Those for which every teacher's run and the supervised one are there."""

    left_out_seeds: tuple[int, ...]
    """Those for which one is missing: no run of theirs is in any mean."""

    left_out_teachers: tuple[str, ...]
    """Those without a single finished run here."""

    supervised_loss: float | None
    """Mean of the supervised arm, nats/token; None with a pruned init, where each teacher has its own."""

    noise: float | None
    """Standard deviation of a run once its seed and its teacher are taken away, nats."""

    delta: float | None
    """Difference below which teachers count as equally good, nats."""

    points: tuple[TeacherPoint, ...]
    """By size."""

    axes: tuple[AxisFit, ...]
    """Size, cross-entropy and, where it was measured, initial KL; none where the curve could not be judged."""

    refused: str | None
    """Why it could not be judged."""

    notes: tuple[str, ...]
    """What a reader must know of it."""

    predictions: tuple[Prediction, ...]
    """What the published laws predict."""

    @property
    def title(self) -> str:
        """How people call it."""
        return f"{self.student}, {self.budget}, alpha {self.alpha:g}, {self.init} init"

    def axis(self, name: AxisName) -> AxisFit | None:
        """The fit over an axis."""
        return next((axis for axis in self.axes if axis.axis == name), None)
