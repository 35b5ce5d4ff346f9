"""The part of `law.json` about one student: its loss as a function of the teacher, and where that is lowest."""

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
    """One teacher of a curve. Means are over the curve's `seeds`, for which no run is missing."""

    name: str
    """The teacher's name."""

    size: int
    """Number of the teacher's parameters, counted as `LawFit.size` says."""

    teacher_loss: float
    """The teacher's own cross-entropy, in nats/token."""

    initial_kl: float | None = None
    """KL from the teacher to the untrained student, in nats/token; None if it was not measured."""

    loss: float
    """Loss of the student with this teacher, in nats/token."""

    above_best: float
    """Loss minus the loss with the curve's best teacher, paired by seed, in nats/token."""

    above_best_interval: Interval
    """The 95 % interval of `above_best` for this pair of teachers, from the noise after pairing seeds. It does not
    account for having chosen the best of several teachers."""

    gain: float
    """Loss of the supervised arm minus the loss with this teacher, in nats/token: positive if the teacher helps."""

    gain_interval: Interval
    """The 95 % interval of `gain`, by Student's t over the paired seeds."""

    within_delta: bool
    """Whether the loss is at most delta above the best."""


class FormFit(Record):
    """One functional form, fitted to a curve over one axis."""

    name: str
    """Name of the form."""

    formula: str
    """Formula of the form in u, which is 0 at the smallest and 1 at the largest teacher."""

    leave_one_out: float | None
    """Root mean square error of predicting a teacher that was left out of the fit, in nats; for an interior curve, only
    teachers between the ends are left out. None if there are too few teachers."""

    losses: tuple[float, ...]
    """The fitted curve at the axis's `places`; empty if the form was not fitted."""


class Best(Record):
    """Where an interior curve is lowest."""

    value: float
    """The best teacher, in the unit of the axis: parameters, or nats/token."""

    interval: Interval
    """The interval over noise, choice of form and left-out teachers, within `bracket`."""

    bracket: Interval
    """The nearest teachers on both sides that are worse beyond noise. The minimum of any curve with one valley lies
    between them, whatever its form."""

    forms: dict[str, float]
    """Share of the resampled fits in which each form with a valley predicted left-out teachers best."""


class AxisFit(Record):
    """A curve over one axis."""

    axis: AxisName
    """`size`: logarithm of the teacher's parameters. `cross_entropy`: minus the teacher's loss. `initial_kl`: logarithm
    of the KL from the teacher to the untrained student."""

    verdict: Verdict
    """Shape of the curve, as `capgap.pipeline.law.verdict` defines it; `interior` has its best teacher in between."""

    reason: str
    """Reason for the verdict, in words."""

    limit: str | None = None
    """What is missing for the verdict `interior`, in standard errors and in seeds; None if that is the verdict."""

    best: Best | None
    """The best teacher of an interior curve; None for other curves."""

    chosen: str
    """The form that predicts left-out teachers best; for an interior curve, among the forms with a valley."""

    forms: tuple[FormFit, ...]
    """All forms that were tried."""

    places: tuple[float, ...]
    """Values on the axis at which the fitted curves are stored: parameters, or nats/token."""

    @property
    def over(self) -> str:
        """The name of the axis in sentences."""
        return {"size": "size", "cross_entropy": "cross-entropy", "initial_kl": "initial KL"}[self.axis]


class CurveFit(Record):
    """The results of one student, budget, alpha and init, over all its teachers."""

    student: str
    """Name of the student."""

    student_size: int
    """Number of the student's parameters, counted as `LawFit.size` says."""

    budget: str
    """Name of the budget."""

    tokens: int
    """Number of tokens that the student was trained on."""

    alpha: float
    """Weight of the KL."""

    init: Init
    """Where the initial weights come from."""

    seeds: tuple[int, ...]
    """Seeds for which the run of every teacher and the supervised run have finished."""

    left_out_seeds: tuple[int, ...]
    """Seeds for which a run is missing. None of their runs is in any mean."""

    left_out_teachers: tuple[str, ...]
    """Teachers without any finished run of this curve."""

    supervised_loss: float | None
    """Mean loss of the supervised arm, in nats/token; None with a pruned init, where each teacher has its own."""

    noise: float | None
    """Standard deviation of a run's loss after the effects of its seed and its teacher are removed, in nats."""

    delta: float | None
    """Difference below which teachers count as equally good, in nats."""

    points: tuple[TeacherPoint, ...]
    """The teachers by size."""

    axes: tuple[AxisFit, ...]
    """Fits over size, cross-entropy and, if it was measured, initial KL; empty if the curve could not be judged."""

    refused: str | None
    """Why the curve could not be judged; None if it was."""

    notes: tuple[str, ...]
    """Remarks that a reader of the curve must know."""

    predictions: tuple[Prediction, ...]
    """Predictions of the published laws for this student."""

    @property
    def title(self) -> str:
        """The name of the curve in headings and messages."""
        return f"{self.student}, {self.budget}, alpha {self.alpha:g}, {self.init} init"

    def axis(self, name: AxisName) -> AxisFit | None:
        """Return the fit over an axis; None if there is none."""
        return next((axis for axis in self.axes if axis.axis == name), None)
