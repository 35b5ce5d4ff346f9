"""benchmarks/rounds.py and rounds_smol.py take every step at their smallest size; which arm wins is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import save_model, tiny_llama

from capgap.pipeline.corpus.tokenizer import train_tokenizer

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


@pytest.mark.slow
def test_a_pruned_student_is_measured_after_every_round(tmp_path: Path) -> None:
    titles = [f"Settings and forms, part {one}" for one in ("one", "two", "three", "four", "five", "six", "seven")]
    titles += [title.replace("forms", "models") for title in titles] + [t.replace("forms", "views") for t in titles]
    (tmp_path / "django-documentation").mkdir()
    for number, title in enumerate(titles):
        text = f"{title}\n{'=' * len(title)}\n\nIn Django, what is meant by a setting? A short sentence says it.\n" * 4
        (tmp_path / "django-documentation" / f"{number}.txt").write_text(text)
    tokenizer = train_tokenizer([text, 'In Django, what is meant by "'] * 9, 300)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    teacher = tiny_llama(2, num_hidden_layers=2, max_position_embeddings=96, vocab_size=len(tokenizer))
    # ends its answers now and then, and none before it begins
    asked = tokenizer(
        f'In Django, what is meant by "{titles[0]}"? Answer in one short sentence.\n', return_tensors="pt"
    )
    first_H = teacher.model(asked["input_ids"]).last_hidden_state[0, -1].detach()
    end_H = torch.randn(len(first_H), generator=torch.Generator().manual_seed(0)) * 5 / len(first_H) ** 0.5
    end_H -= (end_H @ first_H + 3) / (first_H @ first_H) * first_H
    teacher.lm_head.weight.data[tokenizer.eos_token_id] = end_H
    save_model(tmp_path / "tiny", teacher, tokenizer)
    flags = ["--smoke", "--seeds", "1", "--models", str(tmp_path), "--work", str(tmp_path / "work")]
    command = [sys.executable, str(BENCHMARKS / "rounds_smol.py"), *flags, "--results", str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(line["kl_own_by_round"]) == len(line["kl_common_by_round"]) == 2
    # one arithmetic wrote and read them: rounding of float32 alone
    assert max(line["logprob_rms_by_round"]) < 1e-5
    assert {"generate/round-0", "train/distilled/seed-0/round-1"} <= line["took"].keys()
