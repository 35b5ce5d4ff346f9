"""A chart with its words and numbers, and what charts of every page have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from capgap.pipeline.pages.svg import INK

# as many fit beside each other over the width of a chart; a mark takes the room of eight
_LEGEND_LETTERS = 60


@dataclass(frozen=True)
class Chart:
    """A drawing and what it says in words and numbers."""

    name: str
    title: str
    caption: str
    svg: Markup
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def legend(figure: Figure, axes: Any) -> None:
    """Above the chart, where there is more than one thing to name."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, min(3, _LEGEND_LETTERS // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def draw_frontier(axes: Any, points: Iterable[tuple[float, float]], quality: str) -> None:
    """Join the points that no other beats, and label the axes; to be called when everything else is drawn.

    Args:
        axes: of the chart.
        points: floating-point operations and quality, by rising operations.
        quality: what the upright axis shows, with its unit.
    """
    best = list(points)
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color=INK, linewidth=1, label="not beaten")
    _log_operations(axes)
    axes.set_xlabel("floating-point operations")
    axes.set_ylabel(quality)


def _log_operations(axes: Any) -> None:
    """A logarithmic axis of counts too large for words."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = math.log10(high / low) < 2
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda count, _: f"{count:.1e}".replace(".0e", "e").replace("e+", "e"))
    )
    axes.xaxis.set_minor_formatter(NullFormatter())
