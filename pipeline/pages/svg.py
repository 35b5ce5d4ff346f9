"""Draws a matplotlib figure as an SVG element that follows the page's colours and loads nothing from elsewhere.

Matplotlib cannot use CSS variables. A figure is therefore drawn in placeholder colours, which are then replaced by CSS
variables in the text of the SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

NUM_SERIES = 6

INK = "#0a0a01"
GRID = "#0a0a02"
SERIES = tuple(f"#0a0a1{i}" for i in range(NUM_SERIES))

_VARIABLES = {INK: "currentColor", GRID: "var(--grid)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES)
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "capgap",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def draw(name: str, label: str, height_in: float, paint: Callable[[Figure], None]) -> Markup:
    """Draw a figure and return it as an `<svg>` element.

    Args:
        name: Prefix of all ids in the element, which keeps the ids of several charts in one page apart.
        label: Text that says what the chart shows, for readers who cannot see it.
        height_in: Height in inches; all charts have the same width.
        paint: Function that draws on an empty figure, in the colours `INK`, `GRID` and `SERIES`.
    """
    buffer = io.StringIO()
    with _house_style():
        figure = Figure(figsize=(5, height_in), layout="constrained")
        paint(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Markup(_inline(buffer.getvalue(), name, label))


@contextmanager
def _house_style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def _inline(text: str, name: str, label: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="[^"]*"', text)
    size = view_box.group(0) if view_box else ""
    element = f'<svg class="chart" role="img" aria-label="{escape(label)}" {size}>'
    # returned by a function, because a backslash in the text of a replacement has a meaning of its own
    text = re.sub(r"<svg[^>]*>", lambda _: element, text, count=1)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text
