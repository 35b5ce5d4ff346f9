"""Charts of the reliability of the models' probabilities, of the time of stages and of the lengths of documents."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from capgap.pipeline.pages.charts import Chart, legend
from capgap.pipeline.pages.numbers import human_count
from capgap.pipeline.pages.svg import INK, SERIES, draw
from capgap.pipeline.report.charts import arm_look
from capgap.pipeline.report.stages import duration
from capgap.pipeline.report.summary import Report, StageLine
from capgap.schemas.facts import SplitFacts
from capgap.schemas.results import ModelResult

# The most stages that are drawn one by one; in larger runs they are summed by kind.
_MOST_STAGES = 14
# The most lengths that are named below a chart, so that their texts do not overlap.
_MOST_TICKS = 7


def run_charts(report: Report) -> tuple[Chart, ...]:
    """Draw reliability if it was measured, the time of stages, and document lengths if the corpus has counted them."""
    return (
        *_reliability(report.results.models, report.results.arms),
        _stages(report.stages),
        *_lengths(report.cache.facts.splits.get("student")),
    )


def _lengths(split: SplitFacts | None) -> tuple[Chart, ...]:
    """Draw the number of documents by their length in tokens."""
    if split is None or not split.by_length:
        return ()
    first = next(digits for digits, number in enumerate(split.by_length) if number)
    counts = split.by_length[first:]
    ticks = [human_count(2**digits // 2) for digits in range(first, len(split.by_length))]
    names = [f"{2**digits // 2:,} to {2**digits - 1:,}" for digits in range(first, len(split.by_length))]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.bar(range(len(counts)), counts, color=SERIES[0], width=0.8)
        every = math.ceil(len(counts) / _MOST_TICKS)
        axes.set_xticks(range(0, len(counts), every), ticks[::every])
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("tokens, at least")
        axes.set_ylabel("documents")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))

    listed = "; ".join(f"{name}: {number:,}" for name, number in zip(names, counts, strict=True))
    return (
        Chart(
            name="document-lengths",
            title="Documents by length",
            caption="Documents of the text that students learn from, counted before they are packed into sequences.",
            svg=draw("document-lengths", f"Documents by length in tokens: {listed}", 2.6, paint),
            headings=("tokens", "documents"),
            rows=tuple((name, f"{number:,}") for name, number in zip(names, counts, strict=True)),
        ),
    )


def _stages(stages: tuple[StageLine, ...]) -> Chart:
    """Draw the seconds of each stage; its table also has the tokens."""
    shown = [(one.instance, one.wall_s, one.num_tokens) for one in stages]
    if len(shown) > _MOST_STAGES:
        shown = _by_kind(stages)
    texts = [duration(wall_s) + ("" if tokens is None else f", {tokens:,} tokens") for _, wall_s, tokens in shown]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        places = range(len(shown))
        axes.barh(places, [wall_s for _, wall_s, _ in shown], color=SERIES[0], height=0.55)
        axes.set_yticks(places, [name for name, _, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        # centred on the figure: beside long names the axes are narrower than this
        figure.supxlabel("seconds of all processes together", fontsize="medium")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(axis="x", nbins=5)

    listed = "; ".join(f"{name} {text}" for (name, _, _), text in zip(shown, texts, strict=True))
    return Chart(
        name="stage-times",
        title="Time by stage",
        caption="The time of all processes of a stage together, including starts and waiting for the device.",
        svg=draw("stage-times", f"Time by stage: {listed}", 0.9 + 0.24 * len(shown), paint),
        headings=("stage", "time", "tokens"),
        rows=tuple(
            (name, duration(wall_s), "-" if tokens is None else f"{tokens:,}") for name, wall_s, tokens in shown
        ),
    )


def _by_kind(stages: tuple[StageLine, ...]) -> list[tuple[str, float, int | None]]:
    kinds: dict[str, list[StageLine]] = {}
    for one in stages:
        kinds.setdefault(one.instance.split("/")[0], []).append(one)
    return [
        (
            name if len(found) == 1 else f"{name} ({len(found)})",
            sum(one.wall_s for one in found),
            sum(counts) if (counts := [one.num_tokens for one in found if one.num_tokens is not None]) else None,
        )
        for name, found in kinds.items()
    ]


def _reliability(models: tuple[ModelResult, ...], arms: tuple[str, ...]) -> tuple[Chart, ...]:
    """Draw how often the top-1 token is right by its probability, for the teacher and the first seed of each arm."""
    shown = [one for one in models if one.reliability and (one.arm is None or one == _first(models, one.arm))]
    if not shown:
        return ()

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as sure as right")
        for one in shown:
            look = arm_look(one.arm, arms)
            points = [(each.confidence, each.right) for each in one.reliability]
            axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1.2, label=one.arm or "teacher", **look)
        axes.set_xlabel("probability of the top-1 token")
        axes.set_ylabel("share of tokens where it is right")
        legend(figure, axes)

    listed = "; ".join(f"{one.arm or 'teacher'} ECE {100 * (one.ece or 0):.1f} %" for one in shown)
    chart = Chart(
        name="reliability",
        title="Reliability",
        caption="Tokens are put into 15 bins by the probability of the model's top-1 token. On the dotted line a model "
        "is right as often as it claims; below it, it claims too much. ECE is the mean distance from the line, each "
        "bin weighted by its tokens. Each arm is shown with its first seed.",
        svg=draw("reliability", f"Reliability of the models' top-1 tokens: {listed}", 3.4, paint),
        headings=("model", "tokens in the bin", "probability", "right"),
        rows=tuple(
            (
                one.arm or "teacher",
                f"{each.num_tokens:,}",
                f"{100 * each.confidence:.1f} %",
                f"{100 * each.right:.1f} %",
            )
            for one in shown
            for each in one.reliability
        ),
    )
    return (chart,)


def _first(models: tuple[ModelResult, ...], arm: str) -> ModelResult:
    return next(one for one in models if one.arm == arm)
