"""The table of architectures is that of its data; one row is made anew where there is time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "architectures.md"


@pytest.fixture
def page(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import architectures_page

    return architectures_page


def _rows() -> list[dict[str, Any]]:
    (results,) = (BENCHMARKS / "results").glob("architectures-*.jsonl")
    return [json.loads(line) for line in results.read_text().splitlines()]


def test_the_page_in_the_repository_is_that_of_the_results(page, tmp_path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text())
    page.fill_page(copy, _rows())
    assert copy.read_text() == PAGE.read_text()


def test_rows_are_those_of_the_list_and_nearly_all_that_go_through_agree(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from architecture_configs import NAMES

    rows = _rows()
    names = [row["name"] for row in rows]
    assert names == list(NAMES)
    passed = [row for row in rows if "fault" not in row]
    assert all(row["refuses_incomplete"] for row in passed)
    # float32 rounds to 1e-5 nats; what a cache would warn of is 1e-3
    agreeing = [row for row in passed if row["rms_nats"] < 1e-3 and row["same_top"] > 0.99]
    assert len(agreeing) >= 25
    # docs/architectures.md says what is known of them
    assert {row["name"] for row in passed} - {row["name"] for row in agreeing} == {"GPT-NeoX", "Cohere 2", "Apertus"}


def test_a_row_with_a_fault_says_it_in_words_and_breaks_no_table(page) -> None:
    about = {"versions": {"vllm": "0.32.0"}, "machine": {"device": "a processor"}}
    text = page.table([{"name": "One", "fault": "no <kernel> | here"} | about])
    assert "| One |  | no &lt;kernel> / here |  |  |  |" in text and "0 of 1 architectures" in text


@pytest.mark.slow
def test_one_row_is_made_and_kept(tmp_path) -> None:
    pytest.importorskip("vllm")
    results = tmp_path / "rows.jsonl"
    command = [
        sys.executable,
        str(BENCHMARKS / "architectures.py"),
        "--only",
        "Llama",
        "--work",
        str(tmp_path / "work"),
    ]
    # the benchmark finds its neighbours beside it
    done = subprocess.run(
        [*command, "--results", str(results)], env=os.environ | {"PYTHONSAFEPATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert row["class"] == "LlamaForCausalLM" and row["num_labels"] == 2048 and "fault" not in row
    assert row["rms_nats"] < 1e-4 and row["same_top"] > 0.99 and row["refuses_incomplete"]
