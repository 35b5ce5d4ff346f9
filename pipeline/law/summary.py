"""A fit and advice as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.law.advise import Advice
from capgap.pipeline.law.global_law import describe
from capgap.pipeline.law.headline import headline
from capgap.pipeline.pages.numbers import human_count
from capgap.schemas.law_curve import AxisFit, CurveFit
from capgap.schemas.law_fit import LawFit


def lines(law: LawFit) -> Iterator[str]:
    """The fit in one sentence, then verdict by verdict, then the laws, then what is missing."""
    yield headline(law)
    for curve in law.curves:
        yield f"{curve.title}:"
        for sentence in sentences(curve):
            yield f"  {sentence}"
    for one in law.laws:
        yield f"{one.budget}, alpha {one.alpha:g}, {one.init} init: {describe(one)}"
        for remark in one.remarks:
            yield f"  {remark}"
    if law.missing:
        yield f"missing runs ({len(law.missing)}), in no mean:"
        for name in law.missing:
            yield f"  {name}"


def sentences(curve: CurveFit) -> Iterator[str]:
    """What follows from a curve, in words."""
    if curve.refused is not None:
        yield f"not judged: {curve.refused}"
    for axis in curve.axes:
        over = "size" if axis.axis == "size" else "cross-entropy"
        yield f"over {over}: {axis.verdict}. {axis.reason}{_best(axis)}"
    if curve.axes and curve.delta is not None:
        good = ", ".join(point.name for point in curve.points if point.within_delta)
        yield f"within {curve.delta:.4f} nats of the best: {good}"
        best = min(curve.points, key=lambda point: point.loss)
        interval = best.gain_interval
        yield (
            f"gain of {best.name} over training without a teacher: {best.gain:.4f} nats "
            f"({interval.low:.4f} to {interval.high:.4f})"
        )
    for note in curve.notes:
        yield f"note: {note}"
    for one in curve.predictions:
        yield f"{one.sentence}; {one.disagreement}"


def advice_lines(advice: Advice) -> Iterator[str]:
    """Answer by answer, then their disagreement."""
    yield f"student of {human_count(advice.student)}, {human_count(advice.tokens)} tokens"
    for answer in advice.answers:
        yield ""
        yield answer.source
        yield f"  {answer.summary}"
        yield f"  {'inside' if answer.within_validity else 'OUTSIDE'} what it measured: {answer.validity}"
    yield ""
    yield f"disagreement: {advice.disagreement}"
    if advice.warning is not None:
        yield f"warning: {advice.warning}"


def _best(axis: AxisFit) -> str:
    if axis.best is None:
        return ""
    value, low, high = axis.best.value, axis.best.interval.low, axis.best.interval.high
    if axis.axis == "size":
        return f". Best at {human_count(value)} ({human_count(low)} to {human_count(high)})"
    return f". Best at {value:.3f} nats ({low:.3f} to {high:.3f})"
