"""benchmarks/pruning.py compares what it says it compares; what comes out is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from capgap.schemas.run_model import StudentSettings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def pruning(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pruning

    return pruning


def _row(start: str, rate: float, seed: int, loss: float) -> dict:
    return {"start": start, "learning_rate": rate, "seed": seed, "loss": loss}


def test_every_start_is_a_student_and_every_claim_names_two_of_them(pruning) -> None:
    for student in pruning.STARTS.values():
        StudentSettings.model_validate(student)
    assert {name for claim in pruning.CLAIMS for name in claim} <= set(pruning.STARTS)


def test_a_start_is_judged_at_its_own_best_rate_and_paired_by_seed(pruning) -> None:
    losses = {("a", 1.0): (3.0, 4.0), ("a", 2.0): (1.0, 5.5), ("b", 1.0): (3.5, 5.0), ("b", 2.0): (9.0, 4.0)}
    rows = [_row(*start, seed, loss) for start, both in losses.items() for seed, loss in enumerate(both)]
    best = {name: pruning._best(name, rows) for name in ("a", "b")}
    assert [row["learning_rate"] for row in best["a"]] == [2.0, 2.0]
    assert [row["learning_rate"] for row in best["b"]] == [1.0, 1.0]
    assert pruning._claim("a", "b", best)["gains"] == [2.5, -0.5]


@pytest.mark.slow
def test_the_smallest_size_trains_every_start_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "pruning.py"), "--smoke", "--work", "work", "--results", "results"],
        # the benchmark finds its neighbours beside it
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (kept,) = (tmp_path / "results").glob("pruning-smoke-*.json")
    rows = json.loads(kept.read_text())["figures"]["rows"]
    assert len(rows) == 7 and len({row["start"] for row in rows}) == 7
    sizes = [row["num_non_embedding_parameters"] for row in rows]
    assert max(sizes) < 1.01 * min(sizes)
    assert [row["start"] for row in rows if row["kl_before"] is None] == ["fresh"]
