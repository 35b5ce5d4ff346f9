"""benchmarks/align.py and align_quality.py take every step at their smallest size; what comes out is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_the_speed_of_every_recording_is_measured() -> None:
    said = run("align.py", "--quick").stdout
    assert all(f"{name}: " in said for name in ("topk", "sampled", "projected")) and "tokens/s a core" in said


@pytest.mark.slow
def test_every_arm_is_trained_once(tmp_path: Path) -> None:
    flags = ["--smoke", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.jsonl")]
    said = run("align_quality.py", *flags).stdout
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    arms = ["cross_entropy", "chunks", "chunks-100", "chunks-alone", "chunks-reverse", "projected"]
    assert sorted(one["arm"] for one in lines) == sorted(arms)
    assert len(said.splitlines()) == 2 + len(arms)
    assert run("align_quality.py", *flags).stdout == said
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == len(arms)
