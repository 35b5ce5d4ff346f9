"""docs/benchmarks.md shows the presets and the tasks as they are."""

from __future__ import annotations

import re
from pathlib import Path

from capgap.pipeline.benchmark.presets import PRESETS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
TASKS = ROOT / "tests" / "assets" / "benchmarks"


def test_the_table_of_presets_is_the_presets() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \| (\d+) \| `([^`]+)` \|$", PAGE, re.MULTILINE)
    assert rows == [(one.name, one.task, str(one.num_fewshot), one.metric) for one in PRESETS.values()]


def test_the_tasks_on_the_page_are_those_that_the_tests_run() -> None:
    shown = re.findall(r"^```yml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert shown == [(TASKS / f"{name}.yaml").read_text() for name in ("animals", "animals_written")]
    (line,) = re.findall(r"A line of `animals.jsonl` is `(\{.*\})`", PAGE)
    assert line in (TASKS / "animals.jsonl").read_text().splitlines()
