"""Sums up a fit in one plain sentence, which is shown first on its page and by `capgap law fit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from capgap.pipeline.law.global_law import MIN_STUDENTS
from capgap.pipeline.pages.numbers import human_count
from capgap.schemas.law_curve import CurveFit
from capgap.schemas.law_fit import Estimate, GlobalLaw, LawFit

_MEANING = {
    "saturating": "larger teachers stopped helping and did no harm",
    "edge": "it may lie beyond the sizes that were tried",
    "flat": "the teacher's size made no difference that could be measured",
}


def headline(law: LawFit) -> str:
    """Return a sentence on the best teacher's size, or on why the fit shows none."""
    fitted = [(one, one.proportional) for one in law.laws if one.proportional is not None]
    if fitted:
        return _laws_sentence(fitted)
    interior = [curve for curve in law.curves if _verdict(curve) == "interior"]
    if interior:
        return _interior_sentence(interior, len(law.curves))
    return _nothing_sentence(law.curves, bool(law.missing))


def _laws_sentence(fitted: Sequence[tuple[GlobalLaw, Estimate]]) -> str:
    """Return the sentence for one law with its interval, or for the range of several laws."""
    first, ratio = fitted[0]
    sizes = [size for law, _ in fitted for size in (law.min_size, law.max_size) if size is not None]
    students = f"students of {human_count(min(sizes))} to {human_count(max(sizes))} parameters"
    if len(fitted) == 1:
        interval = f"{ratio.interval.low:.3g} to {ratio.interval.high:.3g}"
        return (
            f"The best teacher has about {ratio.value:.3g} times its student's parameters (95 % interval {interval}), "
            f"measured on {len(first.students)} {students}."
        )
    values = [one.value for _, one in fitted]
    return (
        f"The best teacher has about {min(values):.3g} to {max(values):.3g} times its student's parameters, depending "
        f"on budget, alpha and init, measured on {students}."
    )


def _interior_sentence(interior: Sequence[CurveFit], num_curves: int) -> str:
    """Return the sentence on the best teachers of single students, which are too few for a law."""
    bests = [
        f"{human_count(axis.best.value)} for {curve.title}"
        for curve in interior
        if (axis := curve.axis("size")) is not None and axis.best is not None
    ]
    return (
        f"A best teacher is shown in {len(interior)} of {num_curves} curves ({'; '.join(bests)}), and a law over "
        f"students needs {MIN_STUDENTS} students with one."
    )


def _nothing_sentence(curves: Sequence[CurveFit], is_short: bool) -> str:
    if not curves:
        return "The best teacher is not known: the table has no run of a student that a teacher taught."
    verdicts = Counter(verdict for curve in curves if (verdict := _verdict(curve)) is not None)
    if not verdicts:
        why = "runs are missing, and none of" if is_short else "too few teachers or seeds: none of"
        return f"The best teacher is not known: {why} {len(curves)} curves can be judged."
    # there are more curves than students where a student was trained in several ways
    kind = "students" if len({curve.student for curve in curves}) == len(curves) else "students and ways of training"
    shown = [
        f"for {count} of {len(curves)} {kind} {_MEANING[verdict]} ({verdict})"
        for verdict, count in verdicts.most_common()
    ]
    return f"No best size of teacher was found: {'; '.join(shown)}."


def _verdict(curve: CurveFit) -> str | None:
    axis = curve.axis("size")
    return None if axis is None else axis.verdict
