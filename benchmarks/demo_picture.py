"""The picture of README: held-out losses of the demo's models, from the results that `benchmarks/demo.py` kept.

python benchmarks/demo_picture.py benchmarks/results/demo-3-seeds-amd-epyc.json docs/demo.svg

The chart is the report's own, with its colours written into the file, for light and for dark.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib.resources import files
from pathlib import Path

from capgap.pipeline.report.charts import loss_chart
from capgap.schemas.results import EvalResults


def main() -> None:
    """Make the picture, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kept", type=Path, help="results of benchmarks/demo.py")
    parser.add_argument("out", type=Path, help="the SVG file")
    flags = parser.parse_args()
    results = EvalResults.model_validate(json.loads(flags.kept.read_text())["figures"]["results"])
    flags.out.write_text(picture(results))


def picture(results: EvalResults) -> str:
    """An SVG file that needs no page around it."""
    chart = str(loss_chart(results.models, results.arms).svg)
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


if __name__ == "__main__":
    main()
