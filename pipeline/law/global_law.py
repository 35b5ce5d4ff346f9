"""Fits the best teacher's size as a line and as a power of the student's size, over interior students only.

Legend: S students, B samples of the best teachers of all students.

Each student's best teacher is known within an interval. Its logarithm is taken as normal on both sides, with a standard
deviation (spread) of its own on each. Students are weighted by the inverse square of the spread. The interval of an
estimate spans the middle 95 % of the fits to sampled best teachers, and the fits without each student in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.plan.published import GAP_SLOPE
from capgap.schemas.law_curve import AxisName, CurveFit
from capgap.schemas.law_fit import Estimate, GlobalLaw
from capgap.schemas.results import Interval

Array = npt.NDArray[np.float64]

Coefficient = Callable[[Array, Array, Array], Array]

MIN_STUDENTS = 3

_NUM_SAMPLES = 2000
_HALF_WIDTH = 1.96  # half the width of a 95 % interval, in standard deviations
_MIN_SPREAD = 1e-6  # of a logarithm; an interval of no width would get an infinite weight


@dataclass(frozen=True)
class StudentBest:
    """An interior student, with its size and the size of its best teacher in parameters; `interval` is of 95 %."""

    name: str
    size: float
    best: float
    interval: Interval


def global_laws(curves: Sequence[CurveFit]) -> tuple[GlobalLaw, ...]:
    """Fit one law for each budget, alpha and init; a law that cannot be fitted holds the reason."""
    groups: dict[tuple[str, float, str], list[CurveFit]] = {}
    for curve in curves:
        groups.setdefault((curve.init, curve.alpha, curve.budget), []).append(curve)
    return tuple(_law(group) for group in groups.values())


def fit_line(students: Sequence[StudentBest]) -> tuple[float, float, float]:
    """Fit the line T = a S + b, and return a, b and R^2."""
    sizes_S, logs_1S, spread_S = _columns(students)
    slope_1, intercept_1 = _line(sizes_S, logs_1S, spread_S)
    best_S = np.exp(logs_1S[0])
    rest_S = best_S - slope_1[0] * sizes_S - intercept_1[0]
    total = float(np.sum((best_S - best_S.mean()) ** 2))
    return float(slope_1[0]), float(intercept_1[0]), 1 - float(np.sum(rest_S**2)) / total if total else 1.0


def _law(curves: Sequence[CurveFit]) -> GlobalLaw:
    first = curves[0]
    students = [
        StudentBest(curve.student, curve.student_size, axis.best.value, axis.best.interval)
        for curve in curves
        if (axis := curve.axis("size")) is not None and axis.best is not None
    ]
    names = tuple(student.name for student in students)
    sizes = {student.size for student in students}
    if len(sizes) < MIN_STUDENTS:
        refused = (
            f"sizes of students with an interior best teacher: {len(sizes)}, and {MIN_STUDENTS} are needed"
            f"{limits_of(curves, 'size')}"
        )
        return GlobalLaw(budget=first.budget, alpha=first.alpha, init=first.init, students=names, refused=refused)
    slope, exponent = _estimate(students, lambda *c: _line(*c)[0]), _estimate(students, lambda *c: _power(*c)[0])
    return GlobalLaw(
        budget=first.budget,
        alpha=first.alpha,
        init=first.init,
        students=names,
        refused=None,
        min_size=int(min(sizes)),
        max_size=int(max(sizes)),
        proportional=_estimate(students, _proportional),
        slope=slope,
        intercept=_estimate(students, lambda *c: _line(*c)[1]),
        r_squared=fit_line(students)[2],
        exponent=exponent,
        log_factor=float(_power(*_columns(students))[1][0]),
        remarks=(_against("the exponent", exponent, 1.0), _against("the slope", slope, GAP_SLOPE), _weak(len(sizes))),
    )


def _against(what: str, estimate: Estimate, value: float) -> str:
    low, high = estimate.interval.low, estimate.interval.high
    stands = "lies in" if low <= value <= high else "lies outside"
    return f"{value:g} {stands} the interval of {what}, {low:.3g} to {high:.3g}"


def _weak(num_sizes: int) -> str:
    return f"a fit to {num_sizes} points, each no finer than the teachers that were tried: R^2 means little"


def estimate(sizes_S: Array, bests_S: Array, below_S: Array, above_S: Array, coefficient: Coefficient) -> Estimate:
    """Estimate a coefficient with its interval.

    Args:
        sizes_S: Sizes of the students, in parameters or as a logarithm.
        bests_S: The fitted value at each student's best teacher, such as the logarithm of its size.
        below_S: Standard deviation of each best value downwards.
        above_S: Standard deviation of each best value upwards.
        coefficient: Function from sizes [S], sets of best values [B, S] and standard deviations [S] to the coefficient
            of each set [B].
    """
    rng = np.random.default_rng(0)
    bests_1S, spread_S = bests_S[None], (below_S + above_S) / 2
    z_BS = rng.standard_normal((_NUM_SAMPLES, len(bests_S)))
    sampled = coefficient(sizes_S, bests_1S + z_BS * np.where(z_BS < 0, below_S, above_S), spread_S)
    kept = [np.arange(len(bests_S)) != out for out in range(len(bests_S))]
    without = [float(coefficient(sizes_S[keep], bests_1S[:, keep], spread_S[keep])[0]) for keep in kept]
    low, high = np.quantile(sampled, [0.025, 0.975])
    value = float(coefficient(sizes_S, bests_1S, spread_S)[0])
    return Estimate(
        value=value, interval=Interval(low=float(min(low, value, *without)), high=float(max(high, value, *without)))
    )


def limits_of(curves: Sequence[CurveFit], axis: AxisName) -> str:
    """List the students without an interior best teacher on an axis, each with its verdict and what it lacks."""
    others = []
    for curve in curves:
        fit = curve.axis(axis)
        if fit is None:
            others.append(f"{curve.student} (not judged)")
        elif fit.best is None:
            others.append(f"{curve.student} ({fit.verdict}{f': {fit.limit}' if fit.limit else ''})")
    return f"; without an interior best: {'; '.join(others)}" if others else ""


def _estimate(students: Sequence[StudentBest], coefficient: Coefficient) -> Estimate:
    sizes_S, logs_1S, _ = _columns(students)
    return estimate(sizes_S, logs_1S[0], *_spreads(students), coefficient)


def _columns(students: Sequence[StudentBest]) -> tuple[Array, Array, Array]:
    """Return the sizes [S], the logarithms of the best teachers' sizes as one set [1, S], and their spreads [S]."""
    sizes_S = np.array([student.size for student in students], dtype=np.float64)
    logs_1S = np.log(np.array([[student.best for student in students]]))
    below_S, above_S = _spreads(students)
    return sizes_S, logs_1S, (below_S + above_S) / 2


def _spreads(students: Sequence[StudentBest]) -> tuple[Array, Array]:
    """Return the standard deviations [S] of the logarithm of the best teacher's size, downwards and upwards."""
    below = [np.log(student.best / student.interval.low) / _HALF_WIDTH for student in students]
    above = [np.log(student.interval.high / student.best) / _HALF_WIDTH for student in students]
    return np.maximum(below, _MIN_SPREAD), np.maximum(above, _MIN_SPREAD)


def _proportional(sizes_S: Array, logs_BS: Array, spread_S: Array) -> Array:
    """Return k of T = k S [B], by the weighted mean of the logarithm of T / S."""
    weights_S = spread_S**-2
    k_B: Array = np.exp((logs_BS - np.log(sizes_S)) @ weights_S / weights_S.sum())
    return k_B


def _line(sizes_S: Array, logs_BS: Array, spread_S: Array) -> tuple[Array, Array]:
    """Return a and b of T = a S + b [B].

    The spread of T is the spread of its logarithm times T, and T is nearly proportional to S. The weights use S in the
    place of T, because weights by T would depend on the sample and favour low samples.
    """
    return weighted_line(sizes_S, np.exp(logs_BS), np.broadcast_to((spread_S * sizes_S) ** -2.0, logs_BS.shape))


def _power(sizes_S: Array, logs_BS: Array, spread_S: Array) -> tuple[Array, Array]:
    """Return q and ln c of T = c S^q [B]."""
    return weighted_line(np.log(sizes_S), logs_BS, np.broadcast_to(spread_S**-2.0, logs_BS.shape))


def weighted_line(x_S: Array, y_BS: Array, weights_BS: Array) -> tuple[Array, Array]:
    """Return slope and intercept [B] of a line fitted by weighted least squares."""
    total_B = weights_BS.sum(1)
    x_B, y_B = weights_BS @ x_S / total_B, (weights_BS * y_BS).sum(1) / total_B
    off_BS = x_S - x_B[:, None]
    slope_B = (weights_BS * off_BS * y_BS).sum(1) / (weights_BS * off_BS**2).sum(1)
    return slope_B, y_B - slope_B * x_B


def describe(law: GlobalLaw) -> str:
    """Return the law as a sentence."""
    if law.refused is not None or law.slope is None or law.intercept is None or law.proportional is None:
        return f"no law: {law.refused}"
    intercept = f"{'-' if law.intercept.value < 0 else '+'} {human_count(abs(law.intercept.value))}"
    interval = law.proportional.interval
    return (
        f"best teacher = {law.slope.value:.3g} x student {intercept} over {len(law.students)} students; "
        f"in proportion {law.proportional.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"
    )
