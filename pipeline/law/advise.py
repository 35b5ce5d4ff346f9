"""Which teacher for a student that was not trained yet: stored fits and published laws, side by side.

Nothing is averaged. Each answer stands with its source and with whether the student lies in what that source measured,
and the answers' disagreement stands below them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.plan.predictions import nearest, predictions
from capgap.pipeline.plan.published import CAPACITY_GAP, DISTILLATION_SCALING, GivenTeacher, warning_of_ratio
from capgap.schemas.base import Record
from capgap.schemas.errors import SettingError
from capgap.schemas.law_curve import CurveFit
from capgap.schemas.law_fit import GlobalLaw, LawFit
from capgap.schemas.law_prediction import Prediction
from capgap.schemas.results import Interval

_FAR = 10
"""A law is followed up to this factor outside of the students that it was measured on, and names no size beyond."""

_ROOM = 2
"""Tokens a parameter up to this factor outside of a fit's own count as measured."""


class Answer(Record):
    """The answer of one source."""

    source: str
    """A fit or a published law, with where it comes from."""

    best_size: float | None
    """Parameters of the best teacher; None where the source has no answer."""

    interval: Interval | None
    """95 %, of a fit; the published laws give none that applies to one student."""

    choice: str | None
    """The teacher at hand that is nearest to that size, or for a law of losses the one with the least."""

    within_validity: bool
    """Whether the student and its tokens lie in what the source measured."""

    summary: str
    """The answer in words."""

    validity: str
    """What the source measured."""

    outside: tuple[str, ...] = ()
    """How far what is asked lies outside of that, a sentence each; none where it lies inside."""


class Advice(Record):
    """All answers."""

    student: int
    """Parameters."""

    tokens: int
    """That it is to be trained on."""

    answers: tuple[Answer, ...]
    """Stored fits first."""

    disagreement: str
    """In words."""

    verdict: str
    """Whether the fit given was measured on such a student, and what it then says."""

    warning: str | None = None
    """A warning of teachers that another study finds too large for the student; None where there are none."""


def advise(student: int, tokens: int, teachers: Sequence[GivenTeacher], fit: LawFit | None = None) -> Advice:
    """The answers of a stored fit, if there is one, and of the published laws.

    Args:
        student: parameters.
        tokens: that it is to be trained on.
        teachers: at hand.
        fit: of a grid of one's own.

    Raises:
        SettingError: there is no teacher to choose from, or two of one name.
    """
    names = [teacher.name for teacher in teachers]
    if not names or len(set(names)) < len(names):
        raise SettingError(
            "not a choice", where="--teachers", found=", ".join(names) or "none", expected="sizes, each once"
        )
    fits = [] if fit is None else [_law_answer(law, fit, student, tokens, teachers) for law in fit.laws]
    answers = fits + [
        _published_answer(one, student, tokens, teachers) for one in predictions(student, tokens, teachers)
    ]
    return Advice(
        student=student,
        tokens=tokens,
        answers=tuple(answers),
        verdict=_verdict(fits),
        disagreement=_disagreement(answers),
        warning=warning_of_ratio(student, teachers),
    )


def _law_answer(law: GlobalLaw, fit: LawFit, student: int, tokens: int, teachers: Sequence[GivenTeacher]) -> Answer:
    curves = [c for c in fit.curves if (c.budget, c.alpha, c.init) == (law.budget, law.alpha, law.init)]
    sizes = [curve.student_size for curve in curves]
    ratios = [curve.tokens / curve.student_size for curve in curves]
    tried = [point.size for curve in curves for point in curve.points]
    outside = [
        _outside("the student", student, min(sizes), max(sizes)),
        _outside("tokens a parameter", tokens / student, min(ratios) / _ROOM, max(ratios) * _ROOM),
        *(_outside(f"teacher {one.name}", one.size, min(tried), max(tried)) for one in teachers if tried),
    ]
    far = tuple(sentence for sentence in outside if sentence is not None)
    validity = (
        f"students of {human_count(min(sizes))} to {human_count(max(sizes))}, {min(ratios):.3g} to {max(ratios):.3g} "
        f"tokens a parameter, {fit.kept}"
    )
    source = f"fit of {fit.table} ({law.budget}, alpha {law.alpha:g}, {law.init} init)"
    best, interval, summary = _from_law(law, curves, student)
    choice = _nearest(teachers, best)
    if choice is not None:
        summary = f"{summary}; nearest: {choice}"
    return Answer(
        source=source,
        best_size=best,
        interval=interval,
        choice=choice,
        within_validity=outside[:2] == [None, None],
        summary=summary,
        validity=validity,
        outside=far,
    )


def _outside(what: str, value: float, least: float, most: float) -> str | None:
    """By which factor a value lies outside a range; None inside of it."""
    if least <= value <= most:
        return None
    if value > most:
        return f"{what} is {_times(value / most)} x the largest that was measured ({human_count(most)})"
    return f"{what} is {_times(least / value)} x smaller than the least that was measured ({human_count(least)})"


def _times(factor: float) -> str:
    """Three digits of a factor."""
    return f"{factor:.3g}" if factor < 999.5 else f"{float(f'{factor:.3g}'):,.0f}"


def _from_law(law: GlobalLaw, curves: Sequence[CurveFit], student: int) -> tuple[float | None, Interval | None, str]:
    """The best size with its interval, both None where there is no law or the student is far from it, and why."""
    if law.refused is not None:
        return _from_nearest(law, curves, student)
    assert law.min_size is not None and law.max_size is not None
    if not law.min_size / _FAR <= student <= law.max_size * _FAR:
        return None, None, f"no answer for a student so far from those that were measured, by a factor over {_FAR}"
    return _from_power(law, student)


def _from_power(law: GlobalLaw, student: int) -> tuple[float, Interval, str]:
    """The power law's best; its interval turns about the middle of the students, with the exponent's."""
    assert law.exponent is not None and law.log_factor is not None and law.proportional is not None
    assert law.min_size is not None and law.max_size is not None
    best = math.exp(law.log_factor + law.exponent.value * math.log(student))
    middle = (math.log(law.min_size) + math.log(law.max_size)) / 2
    arm = math.log(student) - middle
    steep = [(end - law.exponent.value) * arm for end in (law.exponent.interval.low, law.exponent.interval.high)]
    level = [
        math.log(end / law.proportional.value)
        for end in (law.proportional.interval.low, law.proportional.interval.high)
    ]
    low, high = math.exp(min(steep) + level[0]) * best, math.exp(max(steep) + level[1]) * best
    summary = f"{human_count(best)} ({human_count(low)} to {human_count(high)}), {best / student:.2g} x the student"
    return best, Interval(low=low, high=high), f"{summary}, by T = c S^{law.exponent.value:.3g}"


def _from_nearest(law: GlobalLaw, curves: Sequence[CurveFit], student: int) -> tuple[float | None, None, str]:
    """Without a law, what the student of the nearest size showed, and no number for this one."""
    curve = min(curves, key=lambda curve: abs(math.log(curve.student_size / student)))
    axis = curve.axis("size")
    shown = f"{axis.verdict}: {axis.reason}" if axis is not None else f"not judged: {curve.refused}"
    equals = [point for point in curve.points if point.within_delta]
    good = ", ".join(f"{point.name} ({point.size / curve.student_size:.2g} x)" for point in equals)
    within = f"; within delta of its best: {good}" if good else ""
    where = f"nearest student {curve.student} ({human_count(curve.student_size)})"
    return None, None, f"no law, {law.refused}; {where} {shown}{within}"


def _published_answer(one: Prediction, student: int, tokens: int, teachers: Sequence[GivenTeacher]) -> Answer:
    if one.losses:
        choice: str | None = min(one.losses, key=lambda name: one.losses[name])
    else:
        choice = _nearest(teachers, one.best_size)
    return Answer(
        source=f"{one.law}: {one.source}",
        best_size=one.best_size,
        interval=None,
        choice=choice,
        within_validity=one.within_validity,
        summary=one.summary,
        validity=one.validity,
        outside=_outside_published(one, student, tokens, teachers),
    )


def _outside_published(one: Prediction, student: int, tokens: int, teachers: Sequence[GivenTeacher]) -> tuple[str, ...]:
    (law,) = (law for law in (CAPACITY_GAP, DISTILLATION_SCALING) if law.name == one.law)
    sentences = (
        _outside("the student", student, law.min_student, law.max_student),
        _outside("tokens", tokens, law.min_tokens or 0, law.max_tokens or math.inf),
        *(_outside(f"teacher {teacher.name}", teacher.size, 0, law.max_teacher) for teacher in teachers),
    )
    return tuple(sentence for sentence in sentences if sentence is not None)


def _nearest(teachers: Sequence[GivenTeacher], size: float | None) -> str | None:
    """Name of the teacher nearest to a best size, where there is one."""
    found = nearest(teachers, size) if size is not None else None
    return None if found is None else found.name


def _verdict(fits: Sequence[Answer]) -> str:
    """Whether a measured fit applies, and what it says."""
    if not fits:
        return "no fit of your own was given: what follows was measured elsewhere"
    inside = [one for one in fits if one.within_validity]
    if not inside:
        return f"the fit does not apply: {'; '.join(fits[0].outside[:2])}"
    chosen = next((one for one in inside if one.choice is not None), None)
    if chosen is None:
        return "the fit applies, and shows no best size of teacher"
    return f"the fit applies: take {chosen.choice}"


def _disagreement(answers: Sequence[Answer]) -> str:
    sizes = [answer.best_size for answer in answers if answer.best_size is not None]
    choices = dict.fromkeys(answer.choice for answer in answers if answer.choice is not None)
    if len(sizes) < 2:
        return "fewer than two sources name a size: nothing to compare"
    apart = (
        f"best sizes are {max(sizes) / min(sizes):.2g} x apart ({human_count(min(sizes))} to {human_count(max(sizes))})"
    )
    if len(choices) == 1:
        return f"{apart}; all choose {next(iter(choices))}"
    return f"{apart}; the sources choose differently: {', '.join(map(str, choices))}. Measure, with `capgap law fit`"
