"""benchmarks/quality.py trains every arm once and says what was kept; what comes out is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def _run(*flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "quality.py"), *flags],
        # the benchmark finds its neighbours beside it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def page(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_page

    return quality_page


def _line(arm: str, seed: int, loss: float, kl: float, size: float | None = None) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "heldout_loss": loss,
        "against_teacher": {"kl": kl},
        "bytes_per_token": size,
        "ids_per_token": size and 2 * size,
    }


def test_a_share_is_that_of_the_gain_at_its_own_seed(page) -> None:
    lines = [
        *(_line("cross-entropy", seed, 5.0 + seed, 1.0) for seed in (0, 1, 2)),
        *(_line("online, whole vocabulary", seed, 4.0, 0.5) for seed in (0, 1)),
        _line("top-12, drop", 0, 4.25, 0.75, 20.0),
        _line("top-12, drop", 1, 6.5, 1.25, 20.0),
        _line("top-12, drop", 2, 1.0, 0.1, 20.0),  # there is no online training at this seed to compare with
    ]
    assert page.shares(lines, "top-12, drop", lambda line: line["heldout_loss"]) == [0.75, -0.25]
    (row,) = [row for row in page.table(lines) if row[0] == "top-12, drop"]
    # the standard error of 75 and -25 is 50, and of 0.75, 1.25 and 0.1 is 0.3329
    assert row == (
        "top-12, drop",
        "20.0",
        "40.0",
        "3.9167 +- 1.5964",
        "25.0 +- 50.0",
        "0.7000 +- 0.3329",
        "0.0 +- 50.0",
        "3",
    )
    assert not any("top-50" in row[0] for row in page.table(lines)), "what was not trained has no row"


def test_the_page_in_the_repository_is_that_of_the_results(page) -> None:
    text = (BENCHMARKS.parent / "docs" / "quality.md").read_text()
    assert page.filled(text, BENCHMARKS / "results") == text


def test_the_picture_says_each_share_and_needs_nothing_else(page) -> None:
    lines = [
        _line("cross-entropy", 0, 5.0, 1.0),
        _line("online, whole vocabulary", 0, 4.0, 0.5),
        _line("sampled, n = 50, systematic", 0, 4.1, 0.52, 30.0),
        _line("top-64, ghost", 0, 4.5, 0.75, 130.0),
    ]
    text = page.picture(lines)
    said = ElementTree.fromstring(text).attrib["aria-label"]
    assert "sampled, n = 50, systematic: 96 % at 30 bytes; top-64, ghost: 50 % at 130 bytes" in said
    assert 'href="http' not in text and "url(http" not in text


@pytest.mark.slow
def test_every_arm_is_trained_once_and_a_second_run_trains_none(tmp_path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ["--smoke", "--seeds", "1", "--work", str(tmp_path / "work"), "--results", str(results)]
    _run(*flags)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    found = {line["arm"]: line for line in lines}
    assert len(lines) == len(found) == 31
    for name, line in found.items():
        assert line["num_steps"] == 16 and line["about"]["num_tokens"] == 4096
        assert 0 < line["heldout_loss"] < 10 and line["against_teacher"]["kl"] > 0, name
        assert (line["bytes_per_token"] is None) == name.startswith(("cross-entropy", "online"))
    # independent samples meet one id more often, and systematic ones spend a sample on each likely id
    distinct = {kind: found[f"sampled, n = 50, {kind}"]["ids_per_token"] for kind in ("systematic", "independent")}
    assert 10 < distinct["independent"] < distinct["systematic"] <= 50
    assert [found[f"top-{k}, drop"]["ids_per_token"] for k in (12, 50, 100)] == [12, 50, 100]
    # a line that a kill cut short is trained again, and no other
    cut = results.read_text().splitlines(keepends=True)
    results.write_text("".join(cut[:-1]) + cut[-1][:40])
    again = _run(*flags)
    assert [line.split(", seed")[0].split(" ", 1)[1] for line in again.splitlines() if ", seed 0:" in line] == [
        lines[-1]["arm"]
    ]
    relearnt = json.loads(results.read_text().splitlines()[-1])
    assert relearnt["heldout_loss"] == lines[-1]["heldout_loss"], "a training is a function of its seed and data"
