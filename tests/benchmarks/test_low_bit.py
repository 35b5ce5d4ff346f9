"""benchmarks/low_bit.py trains every arm once and says what was won back; what comes out is not asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_models import save_model, tiny_llama, tiny_tokenizer

from capgap.schemas.run_quantize import QuantizeSettings
from capgap.schemas.run_train import TrainSettings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def low_bit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import low_bit

    return low_bit


@pytest.fixture
def page(low_bit: ModuleType) -> ModuleType:
    import low_bit_page

    return low_bit_page


def _line(arm: str, seed: int, loss: float, kl: float) -> dict[str, Any]:
    found = {"arm": arm, "seed": seed, "heldout_loss": loss, "perplexity": loss, "against_teacher": {"kl": kl}}
    cost = {"bytes_per_token": None, "cpu_s": 90.0 + seed, "peak_bytes": 1e9 + seed}
    return found | cost | {"about": {"format": {"format": "mxfp4"}}, "teacher_loss": math.log(2)}


def test_every_format_and_every_arm_is_one_of_the_settings(low_bit: ModuleType) -> None:
    for settings in low_bit.FORMATS.values():
        QuantizeSettings.model_validate(settings)
    for cache, settings in low_bit.ARMS.values():
        assert cache in low_bit.CACHES
        TrainSettings.model_validate(settings)
    assert set(low_bit.ARMS) == set(low_bit.NAMES)


def test_what_is_won_back_is_paired_by_seed(page: ModuleType) -> None:
    lines = [
        _line("PTQ", 0, 4.0, 1.0),
        *(_line("QAD, online", seed, 3.0 + seed, 0.5 - seed / 4) for seed in (0, 1)),
        _line("QAT, cross-entropy", 0, 3.5, 0.75),
        _line("QAT, cross-entropy", 1, 3.75, 0.25),
        _line("QAT, cross-entropy", 2, 1.0, 0.0),
    ]
    assert page.won_back(lines, "QAT, cross-entropy", "loss") == [0.5], "online wins nothing back at the second seed"
    assert page.won_back(lines, "QAT, cross-entropy", "kl") == [0.5, 1.0], "and was not trained at the third"
    assert page.won_back(lines[1:], "QAT, cross-entropy", "kl") == pytest.approx([math.nan] * 2, nan_ok=True)
    (rows,) = page.tables(lines).values()
    assert rows[2][:4] == ("the teacher itself", "", "2.00", "0")
    # 12.706 standard errors of two shares that are 50 points apart
    assert rows[5] == ("QAD, online", "", "3.50 +- 6.35", "0.3750 +- 1.5882", "100.0 +- 0.0", "100.0", "90", "1.0", "2")
    assert rows[4][4:] == ("75.0 +- 317.6", "50.0", "91", "1.0", "3")


def test_what_the_goal_is_about_comes_first_and_other_tails_have_one_seed(low_bit: ModuleType) -> None:
    jobs = low_bit.in_order(["int4", "mxfp4"], list(low_bit.ARMS), 3)
    assert len(jobs) == len(set(jobs)) == 2 * (1 + 5 * 3 + 3)
    tails = [arm.startswith("QAD, top-64") and not arm.endswith("ghost") for _, arm, _ in jobs]
    assert tails == sorted(tails) and {seed for (*_, seed), is_tail in zip(jobs, tails, strict=True) if is_tail} == {0}
    assert all(seed == 0 for _, arm, seed in jobs if arm == low_bit.PTQ)


def test_each_student_is_measured_on_the_other_text_once(
    low_bit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import low_bit_other_text as other

    monkeypatch.setattr(other, "TEACHER", Path(save_model(tmp_path / "teacher", tiny_llama(0), tiny_tokenizer())))
    monkeypatch.setattr(other, "SEQ_LEN", 24)
    # PTQ's student is the teacher itself here, the other is not, and a tail's is not asked for
    models = {low_bit.PTQ: 0, low_bit.QAT: 1, "QAD, top-64, drop": 2}
    for arm, model in models.items():
        folder = low_bit.trained_in(tmp_path, "mxfp4", arm) / "train" / low_bit.slug(arm) / "seed-0" / "model"
        save_model(folder, tiny_llama(model))
    given, results = tmp_path / "lines.jsonl", tmp_path / "results.jsonl"
    given.write_text("".join(json.dumps(_line(arm, 0, 1.0, 1.0)) + "\n" for arm in models))
    flags = ["--work", str(tmp_path), "--lines", str(given), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["low_bit_other_text.py", *flags])
    other.main()
    same, apart = (json.loads(line) for line in results.read_text().splitlines())
    assert (same["arm"], apart["arm"]) == (low_bit.PTQ, low_bit.QAT)
    assert same["num_tokens"] == 24 * other.NUM_SEQUENCES
    assert same["kl"] == 0 and same["loss"] == same["teacher_loss"] > 1
    assert apart["kl"] > 1e-4 and apart["loss"] != apart["teacher_loss"] == same["teacher_loss"]
    other.main()
    assert len(results.read_text().splitlines()) == 2


@pytest.mark.slow
def test_every_arm_is_trained_once_and_a_second_run_trains_none(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    flags = ["--smoke", "--seeds", "1", "--work", str(tmp_path / "work"), "--results", str(results)]
    command = [sys.executable, str(BENCHMARKS / "low_bit.py"), *flags]
    for _ in range(2):
        # the benchmark finds its neighbours beside it
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        assert len(lines) == 2 * 9
    for line in lines:
        assert line["num_steps"] == (0 if line["arm"] == "PTQ" else 16)
        assert line["against_teacher"]["kl"] > 0 and line["peak_bytes"] > 1e8
        assert (line["bytes_per_token"] is None) == ("sampled" not in line["arm"] and "top-64" not in line["arm"])
