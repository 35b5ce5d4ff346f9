"""Laws of the best teacher in other measures than its parameters: its loss, the gap in loss, and the initial KL.

Legend: S students, B samples of the best teachers of all students.

The best teacher need not be determined by its size. Each measure is fitted twice at the students' best teachers: as a
constant over all students, and as its change for each doubling of the student. A measure that does not change is a law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from capgap.pipeline.law.global_law import MIN_STUDENTS, estimate, global_laws, limits_of, weighted_line
from capgap.schemas.law_curve import AxisName, CurveFit
from capgap.schemas.law_fit import AxisLaw, GlobalLaw, Measure
from capgap.schemas.results import Interval

Array = npt.NDArray[np.float64]

_HALF_WIDTH = 1.96  # half the width of a 95 % interval, in standard deviations
_MIN_SPREAD = 1e-9  # an interval of no width would get an infinite weight


def laws(curves: Sequence[CurveFit]) -> tuple[GlobalLaw, ...]:
    """Fit the laws of sizes, and add the laws of the other measures to each."""
    found = []
    for law in global_laws(curves):
        own = [c for c in curves if (c.budget, c.alpha, c.init) == (law.budget, law.alpha, law.init)]
        axes = tuple(_axis_law(measure, axis, value, own) for measure, (axis, value) in _MEASURES.items())
        found.append(law.model_copy(update={"axes": axes}))
    return tuple(found)


def _axis_law(
    measure: Measure, axis: AxisName, value: Callable[[CurveFit, float], float], curves: Sequence[CurveFit]
) -> AxisLaw:
    if value in (_loss_ratio, _gap) and curves[0].init == "pruned":
        refused = "a student that is cut out of its teachers has another loss without a teacher for each of them"
        return AxisLaw(measure=measure, students=(), refused=refused)
    found: list[tuple[str, float, float, Interval]] = []
    for curve in curves:
        fit = curve.axis(axis)
        if fit is None or fit.best is None:
            continue
        ends = sorted((value(curve, fit.best.interval.low), value(curve, fit.best.interval.high)))
        interval = Interval(low=ends[0], high=ends[1])
        found.append((curve.student, math.log2(curve.student_size), value(curve, fit.best.value), interval))
    names = tuple(name for name, *_ in found)
    if len({size for _, size, *_ in found}) < MIN_STUDENTS:
        refused = (
            f"students with an interior best: {len(found)}, and {MIN_STUDENTS} are needed{limits_of(curves, axis)}"
        )
        judged = [curve for curve in curves if curve.axes]
        if axis == "initial_kl" and judged and all(curve.axis(axis) is None for curve in judged):
            refused = "no student was measured untrained, which a budget of 0 tokens does"
        return AxisLaw(measure=measure, students=names, refused=refused)
    sizes_S = np.array([size for _, size, *_ in found])
    bests_S = np.array([best for _, _, best, _ in found])
    below_S = np.array([(best - interval.low) / _HALF_WIDTH for *_, best, interval in found])
    above_S = np.array([(interval.high - best) / _HALF_WIDTH for *_, best, interval in found])
    columns = (sizes_S, bests_S, np.maximum(below_S, _MIN_SPREAD), np.maximum(above_S, _MIN_SPREAD))
    return AxisLaw(
        measure=measure,
        students=names,
        refused=None,
        constant=estimate(*columns, _mean),
        per_doubling=estimate(*columns, _slope),
    )


def axis_sentences(law: GlobalLaw) -> Iterator[str]:
    """Yield a sentence for each measure's law; measures without a law for the same reason share one sentence."""
    lacking: dict[str, list[str]] = {}
    for one in law.axes:
        if one.constant is None or one.per_doubling is None:
            lacking.setdefault(str(one.refused), []).append(one.measure)
            continue
        value, slope = one.constant, one.per_doubling
        moves = "moves" if slope.interval.low > 0 or slope.interval.high < 0 else "is not shown to move"
        yield (
            f"{one.measure} at the best teacher: {value.value:.3f} ({value.interval.low:.3f} to "
            f"{value.interval.high:.3f}); it {moves} with the student: {slope.value:+.3f} for each doubling "
            f"({slope.interval.low:+.3f} to {slope.interval.high:+.3f})"
        )
    for refused, measures in lacking.items():
        yield f"no law of {', '.join(measures)}: {refused}"


def _mean(sizes_S: Array, bests_BS: Array, spread_S: Array) -> Array:
    mean_B: Array = bests_BS @ spread_S**-2 / np.sum(spread_S**-2)
    return mean_B


def _slope(sizes_S: Array, bests_BS: Array, spread_S: Array) -> Array:
    return weighted_line(sizes_S, bests_BS, np.broadcast_to(spread_S**-2.0, bests_BS.shape))[0]


def _loss(curve: CurveFit, loss: float) -> float:
    return loss


def _loss_ratio(curve: CurveFit, loss: float) -> float:
    assert curve.supervised_loss is not None
    return loss / curve.supervised_loss


def _gap(curve: CurveFit, loss: float) -> float:
    assert curve.supervised_loss is not None
    return curve.supervised_loss - loss


def _initial_kl(curve: CurveFit, divergence: float) -> float:
    return divergence


_MEASURES: dict[Measure, tuple[AxisName, Callable[[CurveFit, float], float]]] = {
    "teacher's loss": ("cross_entropy", _loss),
    "teacher's loss over the student's alone": ("cross_entropy", _loss_ratio),
    "gap in loss": ("cross_entropy", _gap),
    "initial KL": ("initial_kl", _initial_kl),
}
