"""benchmarks/gpu.sh: what fails does not lose the rest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"
# stands for python: says what it was asked for, and fails where a GPU's tests would
PYTHON = """#!/bin/sh
echo "asked for: $*"
case "$*" in *"{fails}"*) exit 7 ;; esac
"""


@pytest.mark.parametrize(("fails", "code"), [("pytest", 1), ("benchmarks/sparse_kl.py", 1), ("nothing", 0)])
def test_every_part_runs_whatever_fails_and_the_table_names_it(tmp_path: Path, fails: str, code: int) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON.format(fails=fails))
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    for part in ("pytest", "benchmarks/sparse_kl.py", "benchmarks/train_step.py", "benchmarks/capture.py"):
        assert any(line.startswith("asked for:") and part in line for line in done.stdout.splitlines()), part
    *_, tests, loss, step, capture, took = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in (tests, loss, step, capture)] == [
        "tests",
        "the loss",
        "a training step",
        "capture",
    ]
    assert sum("exit 7" in line for line in (tests, loss, step, capture)) == code
    assert took.startswith("gpu.sh: took ")
