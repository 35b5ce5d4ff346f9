"""The report's charts, each with its numbers as a table.

An arm keeps its colour and its marker in every chart; the teacher is drawn in the colour of the text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from capgap.pipeline.pages.charts import Chart, legend
from capgap.pipeline.pages.svg import INK, NUM_SERIES, SERIES, draw
from capgap.pipeline.report.summary import Gain, Report, TrainingCurve
from capgap.schemas.results import Interval, ModelResult

_MARKERS = "osD^vP"
_LINES = ("-", "--", ":", "-.")
# Length of a line of the titles left of a chart; more than half of the width stays for the chart itself.
_TITLE_LETTERS = 24


def charts(report: Report) -> tuple[Chart, ...]:
    """Draw all charts of gains, losses and trainings for which the run has numbers."""
    arms = report.results.arms
    students = tuple(curve for curve in report.curves if curve.arm is not None)
    teachers = tuple(curve for curve in report.curves if curve.arm is None)
    found = [_gains(report.gains, arms)] if report.gains else []
    found.append(loss_chart(report.results.models, arms))
    if students:
        found.append(_curves("curves", "Students in training", students, arms))
    if teachers:
        found.append(_curves("teacher-curve", "Teacher in training", teachers, arms))
    return tuple(found)


def _curves(name: str, title: str, curves: tuple[TrainingCurve, ...], arms: tuple[str, ...]) -> Chart:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        labelled: set[str | None] = set()
        for curve in curves:
            label = None if curve.arm in labelled else curve.arm or "teacher"
            labelled.add(curve.arm)
            axes.plot(curve.tokens, curve.losses, label=label, markersize=3, linewidth=1.2, **arm_look(curve.arm, arms))
        axes.set_xlabel("training tokens")
        axes.set_ylabel("held-out loss, nats/token")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        legend(figure, axes)

    ends = "; ".join(f"{title_of(curve.arm, curve.seed)} ends at {curve.losses[-1]:.4f}" for curve in curves)
    return Chart(
        name=name,
        title=title,
        caption="Loss on the training's own validation sequences, which can differ from those of the final measurement."
        + (" Seeds of an arm share its colour." if curves[0].arm else ""),
        svg=draw(name, f"{title}: held-out loss against training tokens; {ends}", 3.5, paint),
        headings=("training tokens", *(title_of(curve.arm, curve.seed) for curve in curves)),
        rows=_side_by_side(curves),
    )


def _side_by_side(curves: tuple[TrainingCurve, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the curves as a table, with one row for every number of tokens and one column for every curve."""
    columns = [dict(zip(curve.tokens, curve.losses, strict=True)) for curve in curves]
    every = sorted({tokens for curve in curves for tokens in curve.tokens})
    return tuple(
        (f"{tokens:,}", *(f"{column[tokens]:.4f}" if tokens in column else "-" for column in columns))
        for tokens in every
    )


def loss_chart(models: tuple[ModelResult, ...], arms: tuple[str, ...]) -> Chart:
    """Draw the held-out loss of every model with its 95 % interval."""
    points = [_Point(title_of(one.arm, one.seed), one.arm, one.loss, one.loss_interval) for one in models]
    listed = "; ".join(f"{point.title} {point.value:.4f}" for point in points)
    return Chart(
        name="losses",
        title="Held-out loss",
        caption="Lines are 95 % intervals over the choice of held-out sequences. All models read the same text, so "
        "intervals that overlap do not mean that two models are alike.",
        svg=draw("losses", f"Held-out loss of every model, nats/token: {listed}", *_points(points, arms, "loss")),
        headings=("model", "loss, nats/token", "low", "high"),
        rows=tuple(point.row() for point in points),
    )


def _gains(gains: tuple[Gain, ...], arms: tuple[str, ...]) -> Chart:
    points = []
    for gain in gains:
        pair = f"{gain.arm} on {gain.baseline}"
        for one in gain.seeds:
            points.append(_Point(f"{pair}, seed {one.seed}", gain.arm, one.difference, one.interval))
        if len(gain.seeds) > 1:
            points.append(_Point(f"{pair}, mean", gain.arm, gain.difference, gain.interval))
    listed = "; ".join(f"{p.title} {p.value:+.4f} ({p.interval.low:+.4f} to {p.interval.high:+.4f})" for p in points)
    size = _points(points, arms, "gain", zero=True)
    return Chart(
        name="gains",
        title="Gain of distillation",
        caption="Loss of the cross-entropy arm minus loss of the distilled arm, token by token on the same text: right "
        "of zero, distillation helped. Lines are 95 % intervals: over held-out sequences for a seed, over seeds for "
        "a mean.",
        svg=draw("gains", f"Gain of distillation, nats/token: {listed}", *size),
        headings=("pair", "gain, nats/token", "low", "high"),
        rows=tuple(point.row() for point in points),
    )


@dataclass(frozen=True)
class _Point:
    title: str
    arm: str | None
    value: float
    interval: Interval

    def row(self) -> tuple[str, ...]:
        return self.title, f"{self.value:.4f}", f"{self.interval.low:.4f}", f"{self.interval.high:.4f}"


def _points(
    points: list[_Point], arms: tuple[str, ...], quantity: str, zero: bool = False
) -> tuple[float, Callable[[Figure], None]]:
    """Return the height in inches and the painter of a chart that has one line for each point."""

    titles = [textwrap.fill(point.title, _TITLE_LETTERS) for point in points]
    num_lines = max(title.count("\n") for title in titles) + 1

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8)
        for y, point in enumerate(points):
            look = arm_look(point.arm, arms)
            axes.plot([point.interval.low, point.interval.high], [y, y], color=look["color"], linewidth=2.2)
            axes.plot([point.value], [y], marker=look["marker"], color=look["color"], markersize=7, linestyle="none")
        axes.set_yticks(range(len(points)), titles)
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        # centred on the figure: beside long titles the axes are narrower than this
        figure.supxlabel(f"{quantity}, nats/token", fontsize="medium")
        axes.locator_params(axis="x", nbins=5)

    return 0.9 + (0.16 + 0.18 * num_lines) * len(points), paint


def arm_look(arm: str | None, arms: tuple[str, ...]) -> dict[str, Any]:
    """Return the colour, the marker and the line style of an arm, as matplotlib's arguments; None is the teacher."""
    if arm is None:
        return {"color": INK, "marker": "s", "linestyle": "-"}
    i = arms.index(arm)
    line = _LINES[i // NUM_SERIES % len(_LINES)]
    return {"color": SERIES[i % NUM_SERIES], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": line}


def title_of(arm: str | None, seed: int | None) -> str:
    """Return the name of a model in charts and tables: `teacher`, or the arm with its seed."""
    return "teacher" if arm is None else f"{arm}, seed {seed}"
