"""The record of a chart with its texts and numbers, and drawing functions that all pages share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from capgap.pipeline.pages.svg import INK

# Number of letters that fit into one line of a legend; the mark beside each label takes the room of eight.
_LEGEND_LETTERS = 60


@dataclass(frozen=True)
class Chart:
    """A drawing, with the same content as text and as a table.

    Attributes:
        name: Identifier of the chart in the page, also its anchor.
        title: Heading above the drawing.
        caption: Explanation below the heading.
        svg: The drawing.
        headings: Column headings of the table of numbers.
        rows: Rows of the table, one text for each heading.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def legend(figure: Figure, axes: Any) -> None:
    """Draw the legend above the chart if there is more than one label."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, min(3, _LEGEND_LETTERS // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def draw_frontier(axes: Any, points: Iterable[tuple[float, float]], quality: str) -> None:
    """Join the points that no other point beats by a step line, and label the axes.

    Call it after everything else is drawn, because the marks on the horizontal axis depend on its limits.

    Args:
        axes: Axes of the chart.
        points: Pairs of floating-point operations and quality, ordered by rising operations.
        quality: Label of the vertical axis, with its unit.
    """
    best = list(points)
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color=INK, linewidth=1, label="not beaten")
    _log_operations(axes)
    axes.set_xlabel("floating-point operations")
    axes.set_ylabel(quality)


def _log_operations(axes: Any) -> None:
    """Make the horizontal axis logarithmic, with counts in scientific notation such as 2e18."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = math.log10(high / low) < 2
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda count, _: f"{count:.1e}".replace(".0e", "e").replace("e+", "e"))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
