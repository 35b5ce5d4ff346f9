"""Fits one curve over size, the teacher's cross-entropy and the initial KL: verdict, forms and best teacher.

Legend: M teachers, R seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from capgap.pipeline.eval.intervals import t_interval, t_quantile
from capgap.pipeline.law.best import locate
from capgap.pipeline.law.contrasts import Contrasts, contrasts
from capgap.pipeline.law.forms import FORMS, fit, leave_one_out
from capgap.pipeline.law.grid import TeacherCurve, size_of
from capgap.pipeline.law.verdict import delta_of, judge
from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.plan.predictions import predictions
from capgap.pipeline.plan.published import GivenTeacher, warning_of_ratio
from capgap.schemas.law import LawTeacher
from capgap.schemas.law_curve import AxisFit, AxisName, Best, CurveFit, FormFit, Size, TeacherPoint
from capgap.schemas.law_prediction import Prediction
from capgap.schemas.results import Interval

Array = npt.NDArray[np.float64]

MIN_TEACHERS = 3
MIN_SEEDS = 2

# Tokens per parameter of a compute-optimal training (Hoffmann et al., arXiv 2203.15556); with fewer, the loss still
# falls fast with every token. The factor beyond which teachers count as trained unlike is a choice of this project.
_ENOUGH_TOKENS, _UNLIKE = 20, 4

_NUM_PLACES = 61  # number of points of a fitted curve that are kept for its chart


def fit_curve(curve: TeacherCurve, size: Size, min_delta: float) -> CurveFit:
    """Fit one curve.

    Args:
        curve: The losses of one student over its teachers.
        size: Which parameters count as size, of teachers and students alike.
        min_delta: Difference below which two teachers count as equally good, nats/token.
    """
    refused = _refusal(curve, size)
    num_seeds = len(curve.seeds)
    found = contrasts(curve.losses_MR) if len(curve.teachers) > 1 and num_seeds > 1 else None
    delta = delta_of(found, min_delta) if found else None
    axes = () if refused or found is None or delta is None else _axes(curve, size, found, delta)
    # pruned students have a loss without a teacher for each teacher, and a curve that lost all its teachers has none
    common = curve.init == "common" and curve.supervised_MR.size > 0
    return CurveFit(
        student=curve.student.name,
        student_size=size_of(curve.student, size),
        budget=curve.budget,
        tokens=curve.tokens,
        alpha=curve.alpha,
        init=curve.init,
        seeds=curve.seeds,
        left_out_seeds=curve.left_out_seeds,
        left_out_teachers=curve.left_out_teachers,
        supervised_loss=float(curve.supervised_MR.mean()) if common else None,
        noise=found.noise if found else None,
        delta=delta,
        points=_points(curve, size, found, delta) if found is not None and delta is not None else (),
        axes=axes,
        refused=refused,
        notes=_notes(curve, size, axes),
        predictions=_predictions(curve, size, axes),
    )


def _refusal(curve: TeacherCurve, size: Size) -> str | None:
    num_seeds, num_teachers = len(curve.seeds), len({size_of(one, size) for one in curve.teachers})
    if num_seeds < MIN_SEEDS:
        left = f"; left out, because a run is missing: {_listed(curve.left_out_seeds)}" if curve.left_out_seeds else ""
        return f"complete seeds: {num_seeds}, and {MIN_SEEDS} are needed to tell noise from difference{left}"
    if num_teachers < MIN_TEACHERS:
        return f"sizes of teachers with results: {num_teachers}, and {MIN_TEACHERS} are needed for a curve"
    return None


def _points(curve: TeacherCurve, size: Size, found: Contrasts, delta: float) -> tuple[TeacherPoint, ...]:
    best = int(np.argmin(found.means_M))
    half = t_quantile(found.degrees) * found.standard_error
    points = []
    for i, teacher in enumerate(curve.teachers):
        above = float(found.means_M[i] - found.means_M[best])
        gain, gain_interval = t_interval((curve.supervised_MR[i] - curve.losses_MR[i]).tolist())
        points.append(
            TeacherPoint(
                name=teacher.name,
                size=size_of(teacher, size),
                teacher_loss=teacher.known_loss,
                initial_kl=None if curve.initial_kl is None else curve.initial_kl[i],
                loss=float(found.means_M[i]),
                above_best=above,
                above_best_interval=Interval(low=above - half, high=above + half)
                if i != best
                else Interval(low=0.0, high=0.0),
                gain=gain,
                gain_interval=gain_interval,
                within_delta=above <= delta,
            )
        )
    return tuple(points)


def _axes(curve: TeacherCurve, size: Size, found: Contrasts, delta: float) -> tuple[AxisFit, ...]:
    log_size_M = np.log([float(size_of(teacher, size)) for teacher in curve.teachers])
    quality_M = -np.array([teacher.known_loss for teacher in curve.teachers])
    axes = [_axis("size", log_size_M, curve, found, delta)]
    if len(set(quality_M.tolist())) >= MIN_TEACHERS:
        axes.append(_axis("cross_entropy", quality_M, curve, found, delta))
    if curve.initial_kl is not None and len(set(curve.initial_kl)) >= MIN_TEACHERS:
        axes.append(_axis("initial_kl", np.log(curve.initial_kl), curve, found, delta))
    return tuple(axes)


def _axis(axis: AxisName, places_M: Array, curve: TeacherCurve, found: Contrasts, delta: float) -> AxisFit:
    judged = judge(places_M, tuple(teacher.name for teacher in curve.teachers), found, delta)
    u_M = (places_M - places_M.min()) / np.ptp(places_M)
    u_kept = np.linspace(0.0, 1.0, _NUM_PLACES)
    is_interior = judged.verdict == "interior"
    forms = []
    for form in FORMS.values():
        if len(set(u_M.tolist())) < form.min_teachers:
            forms.append(FormFit(name=form.name, formula=form.formula, leave_one_out=None, losses=()))
            continue
        error = math.sqrt(float(leave_one_out(form, u_M, found.means_M[None], between_the_ends=is_interior)[1][0]))
        losses = fit(form, u_M, found.means_M[None]).losses_at(u_kept)[0]
        forms.append(
            FormFit(name=form.name, formula=form.formula, leave_one_out=error, losses=tuple(map(float, losses)))
        )
    tried = [form for form in forms if form.leave_one_out is not None]
    # an interior curve is drawn by a form that can be lowest between the ends, if there are enough teachers for one
    tried = [form for form in tried if is_interior and FORMS[form.name].has_valley] or tried
    places = places_M.min() + u_kept * np.ptp(places_M)
    best = locate(places_M, found, judged.bracket) if judged.bracket is not None else None
    return AxisFit(
        axis=axis,
        verdict=judged.verdict,
        reason=judged.reason,
        limit=judged.limit,
        best=_on_axis(axis, best) if best is not None else None,
        chosen=min(tried, key=lambda form: form.leave_one_out or 0.0).name,
        forms=tuple(forms),
        places=tuple(map(float, -places if axis == "cross_entropy" else np.exp(places))),
    )


def _on_axis(axis: AxisName, best: Best) -> Best:
    """Convert the best place on the axis to parameters, nats of cross-entropy or nats of initial KL."""

    def turned(interval: Interval) -> Interval:
        if axis == "cross_entropy":
            return Interval(low=-interval.high, high=-interval.low)
        return Interval(low=math.exp(interval.low), high=math.exp(interval.high))

    value = -best.value if axis == "cross_entropy" else math.exp(best.value)
    return best.model_copy(update={"value": value, "interval": turned(best.interval), "bracket": turned(best.bracket)})


def _notes(curve: TeacherCurve, size: Size, axes: tuple[AxisFit, ...]) -> tuple[str, ...]:
    notes = []
    if curve.init == "pruned":
        notes.append(
            "students are cut out of their teachers: how much of the weights was pruned changes together with the "
            "teacher, so the curve does not show the choice of teacher alone"
        )
    for smaller, larger in zip(curve.teachers, curve.teachers[1:], strict=False):
        if larger.known_loss > smaller.known_loss:
            notes.append(
                f"{larger.name} is larger than {smaller.name} and a worse model ({larger.known_loss:.4f} against "
                f"{smaller.known_loss:.4f} nats): read the curve over cross-entropy"
            )
    unlike = _unlike_trainings(curve.teachers)
    notes += [unlike] if unlike else []
    if len({axis.verdict for axis in axes}) > 1:
        notes.append("the verdict " + ", ".join(f"over {axis.over} is {axis.verdict}" for axis in axes))
    if curve.left_out_seeds:
        notes.append(f"left out, because a run of theirs is missing: {_listed(curve.left_out_seeds)}")
    ratio = warning_of_ratio(size_of(curve.student, size), _given(curve, size))
    notes += [ratio] if ratio else []
    if curve.left_out_teachers:
        notes.append(f"without any finished run: {', '.join(curve.left_out_teachers)}")
    return tuple(notes)


def _unlike_trainings(teachers: Sequence[LawTeacher]) -> str | None:
    """Return a warning where a teacher had too few tokens for its size and far fewer than another; None elsewhere."""
    known = [(one.train_tokens / one.num_parameters, one.name) for one in teachers if one.train_tokens is not None]
    if not known:
        return None
    (least, short), (most, long) = min(known), max(known)
    if least >= _ENOUGH_TOKENS or most <= _UNLIKE * least:
        return None
    return (
        f"tokens a parameter of the teachers lie between {least:.3g} ({short}) and {most:.3g} ({long}): size and "
        "training are mixed; look at cross-entropy"
    )


def _predictions(curve: TeacherCurve, size: Size, axes: tuple[AxisFit, ...]) -> tuple[Prediction, ...]:
    if not curve.teachers:
        return ()
    found = predictions(size_of(curve.student, size), curve.tokens, _given(curve, size))
    return tuple(one.model_copy(update={"disagreement": _disagreement(one, axes)}) for one in found)


def _given(curve: TeacherCurve, size: Size) -> list[GivenTeacher]:
    return [GivenTeacher(one.name, size_of(one, size), one.train_tokens) for one in curve.teachers]


def _disagreement(prediction: Prediction, axes: tuple[AxisFit, ...]) -> str:
    if prediction.best_size is None:
        return "no prediction to compare"
    if not axes:
        return "no measurement to compare: the curve was not judged"
    best = axes[0].best
    if best is None:
        return f"no measured best to compare: the curve is {axes[0].verdict}"
    low, high = best.interval.low, best.interval.high
    stands = "inside" if low <= prediction.best_size <= high else "outside"
    return (
        f"{prediction.best_size / best.value:.2g} x the measured {human_count(best.value)}, {stands} its interval "
        f"({human_count(low)} to {human_count(high)})"
    )


def _listed(seeds: tuple[int, ...]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"
