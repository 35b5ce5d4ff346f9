"""benchmarks/sparse_kl.py measures every way and keeps what it found; what it finds is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "sparse_kl.py"

NEEDS_A_GPU = {
    "cut cross-entropy",
    "Liger fused linear cross-entropy",
    "Liger fused linear cross-entropy in the same chunks",
    "Liger fused linear JSD with a teacher on line",
    "Liger fused linear KL of dense targets",
}


@pytest.mark.slow
def test_every_way_is_measured_and_the_goals_are_judged(tmp_path: Path) -> None:
    # 1 MiB holds 1023 rows of 256 float32: two chunks of the loss, and of torch.func two of 1024
    flags = ["--shape", "1500,8,250,4", "--repeats", "1", "--workspace-mb", "1", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), *flags],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert kept["machine"]["device"] and path.name.startswith("sparse-kl-")
    (shape,) = kept["figures"]
    assert [shape[key] for key in ("num_rows", "hidden", "vocab", "top_k")] == [1500, 8, 250, 4]
    missing = {name for name, figures in shape["ways"].items() if figures is None}
    assert missing - {"torch linear_cross_entropy"} == NEEDS_A_GPU
    for name, figures in shape["ways"].items():
        assert figures is None or (
            figures["ms"] > 0 and figures["peak_mb"] > 0 and figures["time_over_products"] > 0
        ), name
        assert name in done.stdout
    assert len(shape["goals"]) == 2
    for goal in shape["goals"]:
        assert goal["met"] == (goal["found"] <= goal["at_most"])
    # memory, unlike time, is the same in every run; small tensors of rows and kept ids stand beside the formula
    assert shape["ways"]["sparse KL and cross-entropy"]["peak_mb"] <= 1.5 * shape["formula_mb"]
