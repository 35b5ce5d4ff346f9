"""The picture in README: held-out losses of the demo's models, from the results that `benchmarks/demo.py` kept.

python benchmarks/demo_picture.py benchmarks/results/demo-3-seeds-amd-epyc.json docs/demo.svg

The chart is the same as in the report.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from standalone_svg import standalone

from capgap.pipeline.report.charts import loss_chart
from capgap.schemas.results import EvalResults


def main() -> None:
    """Make the picture, and write it to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kept", type=Path, help="results of benchmarks/demo.py")
    parser.add_argument("out", type=Path, help="the SVG file")
    flags = parser.parse_args()
    results = EvalResults.model_validate(json.loads(flags.kept.read_text())["figures"]["results"])
    flags.out.write_text(picture(results))


def picture(results: EvalResults) -> str:
    """Return the chart as an SVG file that needs no page around it."""
    return standalone(str(loss_chart(results.models, results.arms).svg))


if __name__ == "__main__":
    main()
