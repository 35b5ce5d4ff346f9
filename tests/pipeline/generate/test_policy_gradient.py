"""What a student learns from its own text by one logprob a token, and how old that text is."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from round_runs import run_of, start_in
from test_rounds import BARE

from capgap.pipeline.generate.answers_file import WriterLogprobs
from capgap.pipeline.models.load import load_model
from capgap.pipeline.report.round_staleness import staleness
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import LoaderSettings, SequenceLoader, ShardReader
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings

MakeRounds = Callable[..., RunFile]
BY_GRADIENT = {"train": {"divergence": "policy_gradient"}}


@pytest.mark.parametrize(
    ("settings", "rounds", "message"),
    [
        ({"rounds": None}, {}, "distilled.divergence: found policy_gradient without rounds"),
        ({}, {"temperature": 0.7}, "policy_gradient with rounds.temperature 0.7"),
        ({}, {"top_p": 0.9}, "rounds.top_p 0.9"),
        ({"cache": {"temperature": 2.0}}, {}, "cache.temperature 2, expected 1"),
        ({"train": {"divergence": "policy_gradient", "tail": "ghost"}}, {}, "tail: found ghost"),
        ({"train": {"divergence": "policy_gradient", "targets": "online"}}, {}, "targets: found online"),
        ({"train": {"divergence": "policy_gradient", "decode": "device"}}, {}, "decode: found device"),
        ({"train": {"divergence": "policy_gradient", "strategy": "fsdp2"}}, {}, "strategy: found fsdp2"),
        ({"train": {"divergence": "policy_gradient", "temperature": 2.0}}, {}, "temperature: found 2"),
        ({"train": {"ratio_clip": 0.1}}, {}, "ratio_clip: found 0.1 with divergence forward_kl"),
        ({"rounds": None, "train": {"later_learning_rate": 0.1}}, {}, "later_learning_rate: found without rounds"),
    ],
)
def test_what_a_policy_gradient_needs_is_asked_for(settings: dict[str, Any], rounds: dict[str, Any], message) -> None:
    with pytest.raises(ValidationError, match=message):
        whole = BARE | BY_GRADIENT | settings
        RunFile.model_validate(whole) if whole["rounds"] is None else run_of(whole, **rounds)


@pytest.mark.parametrize("recording", ["sampled", "topk"])
def test_rounds_by_gradient_have_the_slope_of_the_dense_form(make_rounds: MakeRounds, recording: str) -> None:
    cache = {"engine": "transformers", "recording": recording} | ({"num_samples": 20} if recording == "sampled" else {})
    slower = {"train": BY_GRADIENT["train"] | {"learning_rate": 1e-3, "later_learning_rate": 1e-4}}
    run = make_rounds(slower | {"cache": cache}, replay=0.5)
    walk(run, instances(run), log=lambda name, why: None, start=start_in(run))
    out = Path(run.out)
    name = "distilled/seed-1/round-1"
    _require_dense(run, name, recording)
    # measured before the first step it is its own writer, and the ratios are 1 but for float32 in another order
    begun, ended = (out / "train" / one for one in ("distilled/seed-1/round-0", name))
    assert staleness(begun) is None
    # both fall to a tenth, and the rows of the two need not be of the same step
    assert 0.05 < _rate(ended) / _rate(begun) < 0.2
    found = staleness(ended)
    assert found is not None and 0 < found["ratio_effective"] < 1
    assert found["ratio_p5"] < found["ratio_median"] < found["ratio_p95"]
    first = (ended / "metrics.csv").read_text().splitlines()
    row = dict(zip(first[0].split(","), first[1].split(","), strict=True))
    assert row["step"] == "0"
    before = [float(row[f"ratio_{one}"]) for one in ("mean", "p5", "p95", "effective")]
    assert before == pytest.approx([1] * 4, abs=1e-3)


def _rate(folder: Path) -> float:
    with (folder / "metrics.csv").open() as file:
        return max(float(row["learning_rate"] or 0) for row in csv.DictReader(file))


def _require_dense(run: RunFile, name: str, recording: str) -> None:
    """The loss and the gradients of a micro-batch, held against autograd on whole logits."""
    out = Path(run.out)
    text, cache = (_manifest(out / stage / name) for stage in ("generate", "cache"))
    reader = ShardReader(out / "cache" / name, cache.shard_sets[recording])
    logprobs = WriterLogprobs(out / "generate" / name, text.shard_sets["student"])
    settings = LoaderSettings(2, 0, context="document", writer_logprobs=logprobs)
    (batch, *_) = SequenceLoader(reader, settings)
    labels_N = batch.labels_BL.flatten()
    counts_N = labels_N >= 0
    assert batch.writer_logprobs_N is not None and batch.teacher_logprobs_N is not None
    student = load_model(str(out / "train" / name / "model"), "cpu").train()
    writer = load_model(str(out / "train" / "distilled" / "seed-1" / "round-0" / "model"), "cpu")
    teacher = load_model(str(run.teacher.path), "cpu")
    objective = Objective(ratio_clip=0.2)
    module = DistillationModule(student, OptimizationSettings(), 1, 1.0, 1.0, reader.codec.vocab_size, objective)
    module.train()
    result = module.loss(batch, 0.75)
    result.loss.backward()
    found = {key: one.grad.clone() for key, one in student.named_parameters() if one.grad is not None}
    student.zero_grad()

    def dense(model: Any) -> torch.Tensor:
        rows = [_dense_row(model, batch, row) for row in range(len(batch.labels_BL))]
        return torch.cat(rows)[counts_N]

    now_N = dense(student)
    with torch.no_grad():
        written_N, scored_N = dense(writer), dense(teacher)
    # float32 sums in another order, and for what the teacher says the cache's codes of 1/64 nat
    torch.testing.assert_close(batch.writer_logprobs_N[counts_N], written_N, rtol=0, atol=1e-4)
    torch.testing.assert_close(batch.teacher_logprobs_N[counts_N], scored_N, rtol=0, atol=1 / 128 + 1e-4)
    ratio_N = (now_N - batch.writer_logprobs_N[counts_N]).exp()
    advantage_N = batch.teacher_logprobs_N[counts_N] - now_N.detach()
    gain_N = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.8, 1.2) * advantage_N)
    loss = -(0.75 * gain_N + 0.25 * now_N).mean()
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-4, atol=1e-5)
    for key, grad in found.items():
        torch.testing.assert_close(grad, dict(student.named_parameters())[key].grad, rtol=1e-3, atol=1e-5)


def _dense_row(model: Any, batch: Any, row: int) -> torch.Tensor:
    """The logprob of each label of a row, document by document; of what is no label that of token 0."""
    ids_L, labels_L = batch.input_ids_BL[row], batch.labels_BL[row].clamp_min(0)
    starts = [*(batch.positions_BL[row] == 0).nonzero()[:, 0].tolist(), len(ids_L)]
    parts = []
    for first, last in itertools.pairwise(starts):
        logits = model(ids_L[None, first:last]).logits[0]
        parts.append(logits.log_softmax(-1).gather(1, labels_L[first:last, None])[:, 0])
    return torch.cat(parts)


def _manifest(folder: Path) -> Manifest:
    found = read_manifest(folder)
    assert found is not None
    return found
