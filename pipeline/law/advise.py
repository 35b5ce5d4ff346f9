"""Advises on the teacher for a student that was not trained yet, by a stored fit and by published laws.

No answers are averaged. Each answer names its source and says whether the source has measured such students. A sentence
on how far the answers disagree follows.
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
"""A law gives no answer for students that are outside the measured range by more than this factor."""

_ROOM = 2
"""Tokens per parameter count as measured up to this factor outside the range of the fit."""


class Answer(Record):
    """The answer of one source."""

    source: str
    """Name of the fit or published law, and its origin."""

    best_size: float | None
    """Number of parameters of the best teacher; None where the source names no size."""

    interval: Interval | None
    """95 % interval of `best_size` for a fit; None for published laws, which give none for a single student."""

    choice: str | None
    """Name of the given teacher that is nearest to `best_size`, or that has the lowest loss by a law of losses."""

    within_validity: bool
    """Whether the student and its tokens lie within the range that the source measured."""

    summary: str
    """The answer in words."""

    validity: str
    """The range that the source measured, in words."""

    outside: tuple[str, ...] = ()
    """One sentence for each value that is outside that range, with the factor; empty where all are inside."""


class Advice(Record):
    """The answers of all sources, and how they compare."""

    student: int
    """Number of parameters of the student."""

    tokens: int
    """Number of tokens that the student is to be trained on."""

    answers: tuple[Answer, ...]
    """The answers of the stored fit, then those of the published laws."""

    disagreement: str
    """A sentence on how far the answers disagree."""

    verdict: str
    """A sentence on whether the given fit applies to the student and, if so, which teacher it chooses."""

    warning: str | None = None
    """A warning of teachers that another study finds too large for the student; None without such teachers."""


def advise(student: int, tokens: int, teachers: Sequence[GivenTeacher], fit: LawFit | None = None) -> Advice:
    """Collect the answers of a stored fit, if there is one, and of the published laws.

    Args:
        student: Number of parameters of the student.
        tokens: Number of tokens that the student is to be trained on.
        teachers: The teachers to choose from.
        fit: Fit of the user's own grid.

    Raises:
        SettingError: There is no teacher to choose from, or two teachers have the same name.
    """
    names = [teacher.name for teacher in teachers]
    if not names or len(set(names)) < len(names):
        raise SettingError(
            "teachers to choose from are missing or repeated",
            where="--teachers",
            found=", ".join(names) or "none",
            expected="at least one size, and each only once",
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
        _outside("tokens a parameter", tokens / student, min(ratios), max(ratios), room=_ROOM),
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


def _outside(what: str, value: float, least: float, most: float, room: float = 1) -> str | None:
    """Return a sentence with the factor by which a value is outside the measured range from `least` to `most`.

    None is returned where the value is inside, or outside by a factor of at most `room`.
    """
    if least / room <= value <= most * room:
        return None
    if value > most:
        return f"{what} is {_times(value / most)} x the largest that was measured ({human_count(most)})"
    return f"{what} is {_times(least / value)} x smaller than the smallest that was measured ({human_count(least)})"


def _times(factor: float) -> str:
    """Format a factor with three digits."""
    return f"{factor:.3g}" if factor < 999.5 else f"{float(f'{factor:.3g}'):,.0f}"


def _from_law(law: GlobalLaw, curves: Sequence[CurveFit], student: int) -> tuple[float | None, Interval | None, str]:
    """Return the best size, its interval and a sentence; size and interval are None where the law gives no answer."""
    if law.refused is not None:
        return _from_nearest(law, curves, student)
    assert law.min_size is not None and law.max_size is not None
    if not law.min_size / _FAR <= student <= law.max_size * _FAR:
        return None, None, f"no answer: the student is outside the measured sizes by a factor of more than {_FAR}"
    return _from_power(law, student)


def _from_power(law: GlobalLaw, student: int) -> tuple[float, Interval, str]:
    """Return the best size by the power law, its interval and a sentence.

    The interval is that of the ratio at the middle of the measured students, and widens away from it by the interval of
    the exponent.
    """
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
    """Return a sentence on the measured student of the nearest size, and no size, because there is no law."""
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
    """Return the name of the teacher that is nearest to a size; None without a size or a teacher."""
    found = nearest(teachers, size) if size is not None else None
    return None if found is None else found.name


def _verdict(fits: Sequence[Answer]) -> str:
    """Return a sentence on whether a fit applies, and which teacher it chooses."""
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
