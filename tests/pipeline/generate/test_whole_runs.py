"""A run with rounds from its command to its report, and a writer in vLLM beside the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from round_runs import FIRST, logprobs_again, make, run_of, settings_of, start_in
from tiny_models import save_model, tiny_vllm_llama

from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import instances
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.run_file import RunFile

MakeRounds = Callable[..., RunFile]


@pytest.mark.slow
def test_arms_in_rounds_are_measured_and_reported_round_by_round(make_rounds: MakeRounds) -> None:
    more: dict[str, Any] = {
        "arms": {"own": {}, "sft": {"alpha": 0.0}, "gradient": {"divergence": "policy_gradient"}},
        "eval": {"num_sequences": 8, "num_full_sequences": 4},
    }
    run = make_rounds(more, off_policy_arms=["sft"], answer_pattern="(.)")
    walk(run, instances(run), log=lambda name, why: None, start=start_in(run))
    assert {one.state for one in states(run).values()} == {State.CURRENT}
    out = Path(run.out)
    results = json.loads((out / "eval" / "results.json").read_bytes())
    assert [one["name"] for one in results["models"]] == [
        "teacher",
        "train/own/seed-1",
        "train/sft/seed-1",
        "train/gradient/seed-1",
    ]
    report = json.loads((out / "report" / "report.json").read_bytes())
    lines = [(one["arm"], one["round"], one["writer"], one["is_trained"]) for one in report["rounds"]]
    assert lines == [
        ("own", 0, "teacher", True),
        ("own", 1, "student", True),
        ("own", 2, "student", False),
        ("sft", 0, "teacher", True),
        ("sft", 1, "teacher", True),
        ("sft", 2, "student", False),
        ("gradient", 0, "teacher", True),
        ("gradient", 1, "student", True),
        ("gradient", 2, "student", False),
    ]
    own, sft = report["rounds"][:3], report["rounds"][3:6]
    # those that learnt from what a student wrote
    assert [one["staleness"] is not None for one in report["rounds"]] == [False, True, False, *[False] * 4, True, False]
    assert own[0]["right"] is not None and own[1]["writer_kl"] > own[0]["writer_kl"]
    # what it wrote, and for an arm that asks for its distributions what it scored
    assert own[0]["teacher_tokens"] > sft[0]["teacher_tokens"] > 0
    assert own[2]["teacher_tokens"] == own[1]["teacher_tokens"] == own[2]["teacher_tokens_before"]
    page = (out / "report" / "report.html").read_text()
    assert all(title in page for title in ("Round by round", "Students by round", "Age of the text by round"))
    frontier = {one["name"]: one for one in report["frontier"]["models"]}
    trained = [read_manifest(out / f"train/own/seed-1/round-{i}") for i in range(2)]
    assert frontier["own"]["tokens"] == sum(one.totals["num_tokens"] for one in trained if one is not None)


@pytest.mark.slow
def test_vllm_writes_what_the_reference_gives_the_same_logprobs(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = settings_of(tmp_path)
    tokenizer = load_tokenizer(settings["teacher"]["path"])
    # heads of the smallest size that vLLM has on a CPU
    model = tiny_vllm_llama(2, 48).eval()
    save_model(tmp_path / "given", model, tokenizer)
    run = run_of(settings, engine="vllm", dtype="float32", num_samples=2)
    made = make(run, "corpus", "teacher", FIRST.name)
    folder = Path(run.out) / FIRST.name
    assert made[FIRST.name].totals["answers"] > 0
    differences = logprobs_again(folder, made[FIRST.name], model)
    # sums of float32 in another order
    assert differences.square().mean().sqrt() < 1e-4
    assert torch.isfinite(differences).all()
    assert carry_out(run, FIRST, remake=True).content == made[FIRST.name].content
