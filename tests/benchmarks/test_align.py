"""benchmarks/align.py and align_quality.py take every step at their smallest size; arms are compared seed by seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture
def page(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import align_page

    return align_page


def test_arms_are_held_against_cross_entropy_of_their_own_seed(page) -> None:
    def line(arm: str, seed: int, bits: float, about: str = "new") -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "bits_per_byte": bits, "chunk_kl": bits / 10, "about": {"text": about}}

    lines = [line("chunks", 0, 9.0, "of another text"), line("cross_entropy", 0, 3.0), line("cross_entropy", 1, 4.0)]
    lines += [line("chunks", 0, 2.0), line("chunks", 1, 2.0), line("chunks", 2, 2.0)]
    first, second = page.table(lines)[2:]
    # 12.706 standard errors of 0.5
    assert first == ("`alpha: 0.0`", "3.500 +- 6.353", "", "0.350 +- 0.635", "", "2")
    # paired, 1 and 2; at the third seed there is no cross-entropy to compare with
    assert second[1:] == ("2.000 +- 0.000", "+1.500 +- 6.353", "0.200 +- 0.000", "+0.150 +- 0.635", "3")


def test_the_tables_of_the_page_are_those_of_the_results(page) -> None:
    text = page.PAGE.read_text()
    assert page.filled(text, page.RESULTS) == text


@pytest.mark.slow
def test_every_arm_is_trained_once(tmp_path: Path) -> None:
    flags = ["--smoke", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "r.jsonl")]
    said = run("align_quality.py", *flags).stdout.splitlines()
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    arms = ["cross_entropy", "chunks-100", "projected", "projected-less", "chunks", "chunks-reverse", "chunks-alone"]
    assert [one["arm"] for one in lines] == arms
    assert len(said) == 2 * len(arms) + 2
    assert run("align_quality.py", *flags).stdout.splitlines() == said[len(arms) :]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == len(arms)
