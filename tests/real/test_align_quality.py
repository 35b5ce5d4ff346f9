"""benchmarks/align_quality.py trains every arm of both pairs of real models, at the smallest size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "align_quality.py"


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["gemma-smol", "smol-gemma"])
def test_a_pair_of_real_models_is_trained_and_measured(
    real_model: Callable[[str], Path], tmp_path: Path, pair: str
) -> None:
    for name in ("SmolLM2-135M-Instruct", "gemma-3-270m"):
        real_model(name)
    results = tmp_path / "r.jsonl"
    flags = ["--pair", pair, "--smoke", "--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [one["arm"] for one in lines] == ["cross_entropy", "chunks-100", "projected"]
    # bits of a byte of English: a model that is not broken needs about 1, and one that knows nothing more than 4
    assert all(0.5 < one["teacher_bits_per_byte"] < 2 and one["bits_per_byte"] < 5 for one in lines)
