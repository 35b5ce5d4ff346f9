"""Turn a page's chart into an SVG file that needs no page around it, with colours for light and dark."""

from __future__ import annotations

import re
from importlib.resources import files


def standalone(chart: str) -> str:
    """Return the text of the SVG file.

    Args:
        chart: An `<svg>` element as `capgap.pipeline.pages.svg.draw` makes it.
    """
    light, dark, *_ = re.findall(
        r"(--paper:.*?)\n\s*}", files("capgap.pipeline.pages").joinpath("style.html.j2").read_text(), re.DOTALL
    )
    style = (
        f"<style>svg {{ {light} color: var(--ink); background: var(--paper); font-family: sans-serif }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    opened = chart.index(">") + 1
    head = chart[:opened].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return re.sub(r"[ \t]+\n", "\n", f"{head}{' '.join(style.split())}{chart[opened:]}\n")
