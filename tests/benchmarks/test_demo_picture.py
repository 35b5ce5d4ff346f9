"""The picture of the demo is of the results that stand beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

from capgap.schemas.results import EvalResults

ROOT = Path(__file__).parents[2]


def test_the_picture_says_what_the_results_do_and_needs_nothing_else() -> None:
    kept = json.loads((ROOT / "benchmarks/results/demo-3-seeds-amd-epyc.json").read_text())
    results = EvalResults.model_validate(kept["figures"]["results"])
    text = (ROOT / "docs/demo.svg").read_text()
    said = ElementTree.fromstring(text).attrib["aria-label"]
    assert re.findall(r"\d\.\d{4}", said) == [f"{model.loss:.4f}" for model in results.models]
    assert 'href="http' not in text and "url(http" not in text
    assert "demo.svg" in (ROOT / "docs/tutorials/first-run.md").read_text()
