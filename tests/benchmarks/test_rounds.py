"""benchmarks/rounds.py takes every step at its smallest size; what comes out is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def rounds(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rounds

    return rounds


def test_a_sum_is_worked_out_column_by_column(rounds) -> None:
    assert rounds.worked_sum(347, 589, 3) == "347+589=7+9=16 4+8+1=13 3+5+1=9 936"
    assert rounds.worked_sum(7, 90, 3) == "007+090=7+0=7 0+9=9 0+0=0 97"


def test_arms_are_held_against_rounds_seed_by_seed(rounds) -> None:
    def line(arm: str, seed: int, right: float) -> dict[str, object]:
        return {"arm": arm, "seed": seed, "right": right, "teacher_tokens": 1000, "student_tokens": 2000}

    lines = [line("rounds", 0, 0.9), line("rounds", 1, 0.8), line("sft", 0, 0.7), line("sft", 1, 0.5)]
    rows = rounds.table(lines)
    # 12.706 standard errors: of 5 points where the shares are 10 apart, of 10 where they are 20
    assert rows[2] == ("`rounds`", "85.0 +- 63.5", "", "1,000", "2,000", "2")
    # paired, 20 and 30 points
    assert rows[3] == ("`sft`", "60.0 +- 127.1", "+25.0 +- 63.5", "1,000", "2,000", "2")


@pytest.mark.slow
def test_every_arm_is_trained_once(tmp_path: Path) -> None:
    flags = ["--smoke", "--seeds", "1", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.jsonl")]
    command = [sys.executable, str(BENCHMARKS / "rounds.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [one["arm"] for one in lines] == ["rounds", "policy_gradient", "off_policy", "sft", "online"]
    assert len({one["student_tokens"] for one in lines}) == 1
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stderr == ""
