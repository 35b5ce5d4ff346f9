"""A chart with its words and numbers, and what charts of every page have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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


def log_operations(axes: Any) -> None:
    """A logarithmic axis of counts too large for words; to be called when everything is drawn."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    few = math.log10(high / low) < 2
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:.0e}".replace("e+", "e")))
    axes.xaxis.set_minor_formatter(NullFormatter())
