"""Staleness of each round's text: how far the trained student has moved from the student that wrote the text.

It is measured by ratios of probabilities: the trained student's probability of a token over the writer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from capgap.pipeline.pages.charts import Chart, legend
from capgap.pipeline.pages.svg import draw
from capgap.pipeline.report.charts import arm_look
from capgap.pipeline.report.summary import RoundLine
from capgap.pipeline.stage.scalars import METRICS_NAME, TRAINING_SCALARS
from capgap.pipeline.train.metrics import read_rows

_RATIOS = tuple(name for name in TRAINING_SCALARS if name.startswith("ratio_"))


def staleness(training: Path) -> dict[str, float] | None:
    """Return the ratios of the last measurement in a training's folder, by their columns in metrics.csv.

    None where no text of the training was written by a student.
    """
    measured = [row for row in read_rows(training / METRICS_NAME) if row["ratio_mean"]]
    return {name: float(measured[-1][name]) for name in _RATIOS} if measured else None


def staleness_charts(lines: tuple[RoundLine, ...], arms: tuple[str, ...]) -> tuple[Chart, ...]:
    """Draw the ratios by round; return no chart where no student learnt from a student's text."""
    known = [(line, line.staleness) for line in lines if line.staleness is not None]
    if not known:
        return ()

    def paint(figure: Figure) -> None:
        by_ratio, by_worth = figure.subplots(1, 2)
        labelled: set[str] = set()
        for arm, seed in dict.fromkeys((line.arm, line.seed) for line, _ in known):
            own = [(line.round, ratios) for line, ratios in known if (line.arm, line.seed) == (arm, seed)]
            rounds = [number for number, _ in own]
            label = None if arm in labelled else arm
            labelled.add(arm)
            look: dict[str, Any] = {"markersize": 3, "linewidth": 1.2, **arm_look(arm, arms)}
            by_ratio.plot(rounds, [ratios["ratio_median"] for _, ratios in own], label=label, **look)
            low, high = ([ratios[name] for _, ratios in own] for name in ("ratio_p5", "ratio_p95"))
            by_ratio.vlines(rounds, low, high, color=look["color"], linewidth=1)
            by_worth.plot(rounds, [100 * ratios["ratio_effective"] for _, ratios in own], **look)
        by_ratio.set_yscale("log")
        by_ratio.set_ylabel("student / writer")
        by_worth.set_ylabel("effective samples, %")
        for axes in (by_ratio, by_worth):
            axes.set_xlabel("round")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, by_ratio)

    return (
        Chart(
            name="staleness",
            title="Age of the text by round",
            caption="A trained student's probability of a token over that of the student that wrote it, on held-out "
            "answers: the median, and lines from 5 to 95 % of them. Effective samples: what such tokens are worth "
            "beside as many of the trained student's own.",
            svg=draw("staleness", "ratios of student to writer, and effective samples, by round", 3.5, paint),
            headings=("arm", "seed", "round", *(name.removeprefix("ratio_") for name in _RATIOS)),
            rows=tuple(
                (line.arm, str(line.seed), str(line.round), *(f"{ratios[name]:.4g}" for name in _RATIOS))
                for line, ratios in known
            ),
        ),
    )
