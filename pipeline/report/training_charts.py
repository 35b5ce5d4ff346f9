"""Small charts of what each training logged: nearness to the teacher, loss, throughput, gradient norm and waiting."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from capgap.pipeline.pages.charts import Chart, legend
from capgap.pipeline.pages.svg import draw
from capgap.pipeline.report.charts import arm_look, title_of
from capgap.pipeline.report.summary import TrainingCurve

# by column of metrics.csv: title, label of the axis, caption
MEASURES: dict[str, tuple[str, str, str]] = {
    "heldout_kl": (
        "KL to the teacher, in training",
        "KL, nats/token",
        "On held-out sequences of the cache, at the cache's temperature.",
    ),
    "heldout_teacher_ce": (
        "Nearness to the teacher, in training",
        "cross-entropy with\nsamples, nats/token",
        "Cross-entropy with the teacher's samples on held-out sequences of the cache. Two arms differ in it by as much "
        "as in their KLs.",
    ),
    "train_ce": (
        "Training loss",
        "cross-entropy, nats/token",
        "Cross-entropy with the training text. It is logged for every arm, whatever its loss is.",
    ),
    "tokens_per_s": ("Throughput", "tokens/s", "Of the logged steps, without measurements of held-out text."),
    "gradient_norm": ("Gradient norm", "norm before clipping", "Mean over the steps since the previous logged step."),
    "data_wait_fraction": (
        "Waiting for data",
        "share of the time",
        "Share of the time that the training waits for the loader. Near zero, the device is what limits the training.",
    ),
}

_MOST_ROWS = 40


def training_charts(curves: tuple[TrainingCurve, ...], arms: tuple[str, ...]) -> tuple[Chart, ...]:
    """Draw one chart for each measure that at least one student's training has logged."""
    students = tuple(curve for curve in curves if curve.arm is not None)
    return tuple(
        _chart(name, tuple(curve for curve in students if name in curve.measures), arms)
        for name in MEASURES
        if any(name in curve.measures for curve in students)
    )


def _chart(name: str, curves: tuple[TrainingCurve, ...], arms: tuple[str, ...]) -> Chart:
    title, label, caption = MEASURES[name]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        labelled: set[str | None] = set()
        for curve in curves:
            look = arm_look(curve.arm, arms) | {"marker": "none"}
            series = curve.measures[name]
            axes.plot(
                series.tokens, series.values, label=None if curve.arm in labelled else curve.arm, linewidth=1.2, **look
            )
            labelled.add(curve.arm)
        axes.set_xlabel("training tokens")
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name in ("tokens_per_s", "data_wait_fraction"):
            axes.set_ylim(bottom=0)
        legend(figure, axes)

    ends = "; ".join(
        f"{title_of(curve.arm, curve.seed)} ends at {curve.measures[name].values[-1]:.4g}" for curve in curves
    )
    chart = f"measure-{name.replace('_', '-')}"
    return Chart(
        name=chart,
        title=title,
        caption=caption,
        svg=draw(chart, f"{title}, {' '.join(label.split())}, against training tokens: {ends}", 2.6, paint),
        headings=("training tokens", *(title_of(curve.arm, curve.seed) for curve in curves)),
        rows=_rows(name, curves),
    )


def _rows(name: str, curves: tuple[TrainingCurve, ...]) -> tuple[tuple[str, ...], ...]:
    """Return one row for each logged number of tokens; of long trainings, about 40 evenly chosen rows and the last."""
    columns = [dict(zip(one.measures[name].tokens, one.measures[name].values, strict=True)) for one in curves]
    every = sorted({tokens for column in columns for tokens in column})
    step = -(-len(every) // _MOST_ROWS)
    kept = sorted({*every[::step], every[-1]})
    return tuple(
        (f"{tokens:,}", *(f"{column[tokens]:.4g}" if tokens in column else "-" for column in columns))
        for tokens in kept
    )
