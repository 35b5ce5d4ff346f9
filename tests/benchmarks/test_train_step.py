"""benchmarks/train_step.py measures its ways and judges its goals; what it finds is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "train_step.py"


@pytest.mark.slow
def test_each_way_is_measured_and_the_goals_are_judged(tmp_path) -> None:
    results = tmp_path / "results"
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARK),
            "--size",
            "smoke",
            "--work",
            str(tmp_path / "work"),
            "--results",
            str(results),
        ],
        # the benchmark finds its neighbours beside it
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = results.iterdir()
    figures = json.loads(path.read_text())["figures"]
    assert figures["tokens_per_step"] == 4 * 64
    assert list(figures["precisions"]) == ["32-true", "bf16-mixed"]
    for measured in figures["precisions"].values():
        assert list(measured["ways"]) == ["cross-entropy alone", "sampled, n = 50", "top-64"]
        for name, found in measured["ways"].items():
            assert found["ms"] > found["of_which_loader_ms"] > 0, name
            assert 0 <= found["data_wait_fraction"] < 1
            low, high = found["ratio_quartiles"]
            assert low <= found["ratio"] <= high
        own = measured["ways"]["cross-entropy alone"]
        assert own["ratio"] == own["peak_ratio"] == 1
        assert len(measured["goals"]) == 6
        for goal in measured["goals"]:
            # both are rounded
            assert goal["met"] == (goal["found"] <= goal["at_most"]) or abs(goal["found"] - goal["at_most"]) < 1e-4
    sizes = figures["bytes_per_token"]
    assert sizes["cross-entropy alone"] < sizes["sampled, n = 50"] < sizes["top-64"]
