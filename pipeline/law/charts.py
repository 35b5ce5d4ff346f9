"""Draws the charts of a fit, each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from capgap.pipeline.pages.charts import Chart, draw_frontier, legend
from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.pages.svg import INK, SERIES, draw
from capgap.pipeline.plan.published import CAPACITY_GAP, gap_best_teacher
from capgap.schemas.law_curve import AxisFit, AxisName, CurveFit, TeacherPoint
from capgap.schemas.law_fit import GlobalLaw, LawFit
from capgap.schemas.law_frontier import Frontier

_PUBLISHED_LINES = ("--", ":")
_ROOM = 1.5  # a prediction outside the teachers' sizes by more than this factor is not drawn; the text has it


def curve_charts(i: int, curve: CurveFit) -> tuple[Chart, ...]:
    """Draw a student's loss over its teachers, one chart for each axis."""
    return tuple(_curve(f"curve-{i}-{axis.axis}", curve, axis) for axis in curve.axes)


def law_chart(i: int, law: GlobalLaw, fit: LawFit) -> Chart | None:
    """Draw the best teacher against the student; None where fewer than two students have a best teacher."""
    chosen = [c for c in fit.curves if (c.budget, c.alpha, c.init) == (law.budget, law.alpha, law.init)]
    rows = [(c, axis.best) for c in chosen if (axis := c.axis("size")) is not None and axis.best is not None]
    if len(rows) < 2:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        sizes = [curve.student_size for curve, _ in rows]
        for n, (curve, best) in enumerate(rows):
            label = "measured, 95 %" if n == 0 else None
            ends = [best.interval.low, best.interval.high]
            axes.plot([curve.student_size] * 2, ends, color=SERIES[0], linewidth=2.2)
            axes.plot([curve.student_size], [best.value], "o", color=SERIES[0], markersize=7, label=label)
        if law.slope is not None and law.intercept is not None and len(set(sizes)) > 1:
            fitted = [law.slope.value * size + law.intercept.value for size in sizes]
            axes.plot(sizes, fitted, color=SERIES[0], linewidth=1.2, label="line fitted")
        predicted = [(size, teacher) for size in sizes if (teacher := gap_best_teacher(size)) is not None]
        if predicted:
            axes.plot(
                *zip(*predicted, strict=True), marker="x", color=SERIES[1], linestyle="--", label=CAPACITY_GAP.name
            )
        _log_counts(axes.xaxis, axes.set_xscale)
        _log_counts(axes.yaxis, axes.set_yscale)
        axes.set_xlabel("student, parameters")
        axes.set_ylabel("best teacher, parameters")
        legend(figure, axes)

    name, title = f"law-{i}", f"Best teacher by student: {law.budget}, alpha {law.alpha:g}, {law.init} init"
    listed = "; ".join(f"{curve.student} {human_count(best.value)}" for curve, best in rows)
    return Chart(
        name=name,
        title=title,
        caption=f"Interior students only. {law.refused or 'Lines are 95 % intervals.'}",
        svg=draw(name, f"{title}: {listed}", 3.5, paint),
        headings=("student", "parameters", "best teacher", "low", "high", "best / student", "2.498 S - 11.498M"),
        rows=tuple(
            (
                curve.student,
                human_count(curve.student_size),
                human_count(best.value),
                human_count(best.interval.low),
                human_count(best.interval.high),
                f"{best.value / curve.student_size:.3g}",
                _predicted(curve.student_size),
            )
            for curve, best in rows
        ),
    )


def _predicted(student: float) -> str:
    best = gap_best_teacher(student)
    return "-" if best is None else human_count(best)


def frontier_chart(frontier: Frontier) -> Chart:
    """Draw loss against compute, and mark the settings that no other setting beats."""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        looks = ((False, "o", SERIES[0], "distilled"), (True, "s", SERIES[1], "supervised"))
        for supervised, marker, color, label in looks:
            some = [point for point in frontier.points if point.supervised == supervised]
            if some:
                x, y = [point.flops for point in some], [point.loss for point in some]
                axes.plot(x, y, marker, color=color, markersize=5, label=label)
        best = ((point.flops, point.loss) for point in frontier.points if point.on_frontier)
        draw_frontier(axes, best, "held-out loss, nats/token")
        legend(figure, axes)

    name = f"frontier-{frontier.accounting}"
    best = "; ".join(f"{p.name} {p.loss:.4f} at {p.flops:.3g}" for p in frontier.points if p.on_frontier)
    missing = f" Left out: {'; '.join(frontier.left_out)}." if frontier.left_out else ""
    return Chart(
        name=name,
        title=f"Frontier, accounting '{frontier.accounting}'",
        caption=f"{frontier.stated} Means over all seeds of a student.{missing}",
        svg=draw(name, f"Loss against compute; not dominated: {best}", 3.5, paint),
        headings=("setting", "operations", "loss, nats/token", "seeds", "on the frontier"),
        rows=tuple(
            (p.name, f"{p.flops:.4g}", f"{p.loss:.4f}", str(p.num_seeds), "yes" if p.on_frontier else "no")
            for p in frontier.points
        ),
    )


def _curve(name: str, curve: CurveFit, axis: AxisFit) -> Chart:
    by_size = axis.axis == "size"
    form = next(form for form in axis.forms if form.name == axis.chosen)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        places = [_place(point, axis.axis) for point in curve.points]
        if axis.best is not None:
            axes.axvspan(axis.best.interval.low, axis.best.interval.high, color=SERIES[0], alpha=0.15, linewidth=0)
            axes.axvline(axis.best.value, color=SERIES[0], linewidth=1)
        axes.plot(axis.places, form.losses, color=SERIES[0], linewidth=1.2, label=f"{axis.chosen}, fitted")
        for place, point in zip(places, curve.points, strict=True):
            half = (point.above_best_interval.high - point.above_best_interval.low) / 2
            axes.plot([place, place], [point.loss - half, point.loss + half], color=INK, linewidth=1.6)
        axes.plot(places, [point.loss for point in curve.points], "o", color=INK, markersize=5, label="students, mean")
        alone = curve.supervised_loss
        if alone is not None and _is_near(alone, curve):
            axes.axhline(alone, color=SERIES[2], linestyle="-.", linewidth=1.2, label="without a teacher")
        if by_size:
            _draw_published(axes, curve)
            _log_counts(axes.xaxis, axes.set_xscale)
            axes.set_xlabel("teacher, parameters")
        elif axis.axis == "initial_kl":
            axes.set_xscale("log")
            axes.set_xlabel("KL from the teacher to the untrained student, nats/token")
        else:
            axes.invert_xaxis()
            axes.set_xlabel("teacher's loss, nats/token (better to the right)")
        axes.set_ylabel("student's loss, nats/token")
        legend(figure, axes)

    title = f"{curve.title}: over {axis.over}"
    points = "; ".join(f"{point.name} {point.loss:.4f}" for point in curve.points)
    return Chart(
        name=name,
        title=title,
        caption=f"{axis.verdict}. Means over seeds {', '.join(map(str, curve.seeds))}. Vertical lines: 95 % "
        "interval of a teacher's difference to the best, with paired seeds. Band: 95 % interval of the best teacher, "
        "where the curve is interior.",
        svg=draw(name, f"{title}, {axis.verdict}: {points}", 3.6, paint),
        headings=_CURVE_HEADINGS,
        rows=tuple(_curve_rows(curve)),
    )


_CURVE_HEADINGS = (
    "teacher",
    "parameters",
    "teacher / student",
    "teacher's loss",
    "student's loss",
    "above the best",
    "low",
    "high",
    "gain over supervised",
    "low",
    "high",
    "within delta",
)


def _curve_rows(curve: CurveFit) -> Iterator[tuple[str, ...]]:
    for point in curve.points:
        yield (
            point.name,
            human_count(point.size),
            f"{point.size / curve.student_size:.3g}",
            f"{point.teacher_loss:.4f}",
            f"{point.loss:.4f}",
            f"{point.above_best:.4f}",
            f"{point.above_best_interval.low:.4f}",
            f"{point.above_best_interval.high:.4f}",
            f"{point.gain:.4f}",
            f"{point.gain_interval.low:.4f}",
            f"{point.gain_interval.high:.4f}",
            "yes" if point.within_delta else "no",
        )


def _place(point: TeacherPoint, axis: AxisName) -> float:
    if axis == "initial_kl":
        assert point.initial_kl is not None
        return point.initial_kl
    return float(point.size) if axis == "size" else point.teacher_loss


def _draw_published(axes: Any, curve: CurveFit) -> None:
    low, high = curve.points[0].size / _ROOM, curve.points[-1].size * _ROOM
    for line, prediction in zip(_PUBLISHED_LINES, curve.predictions, strict=False):
        if prediction.best_size is not None and low <= prediction.best_size <= high:
            outside = "" if prediction.within_validity else ", outside its range"
            label = f"{prediction.law}{outside}"
            axes.axvline(prediction.best_size, color=SERIES[1], linestyle=line, linewidth=1.4, label=label)


def _is_near(loss: float, curve: CurveFit) -> bool:
    """Return whether the teachers keep a third of the height if a loss is drawn too; otherwise only the text has it."""
    losses = [point.loss for point in curve.points]
    return max(*losses, loss) - min(*losses, loss) <= 3 * (max(losses) - min(losses))


def _log_counts(axis: Any, set_scale: Any) -> None:
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda count, _: human_count(count)))
    axis.set_minor_formatter(NullFormatter())
