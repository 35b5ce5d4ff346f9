"""Held-out sequences: the loss with their text, and how near a student comes to the teacher there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_tasks import tiny_task

from capgap.pipeline.cache.stage import _first_blocks
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.batch import collate
from capgap.pipeline.train.data import heldout_batches, num_validation_sequences
from capgap.pipeline.train.heldout import HeldOutFigures, entropies, measure
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.task import TrainingTask
from capgap.pipeline.train.top_ids import top_ids
from capgap.schemas.run_optimization import OptimizationSettings

V = 40


def _module(student, temperature: float = 1.0, objective: Objective | None = None) -> DistillationModule:
    return DistillationModule(student, OptimizationSettings(), 10, 1.0, temperature, V, objective or Objective())


def _logits(module: DistillationModule, input_ids_BL: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return module.model(input_ids=input_ids_BL).logits[..., :V].double().flatten(0, 1)


def test_the_held_out_loss_is_the_mean_over_labels_of_all_batches(make_student, make_sequences) -> None:
    sequences = make_sequences(5)
    sequences.mask_BL1[0, 3:] = False
    batches = [collate([(sequences, None, row) for row in rows], 1) for rows in ((0,), (1, 2, 3, 4))]
    module = _module(make_student())
    module.train()
    found = measure(module, batches)
    assert module.training, "it is given back as it was"
    assert (found.kl, found.teacher_ce, found.top1) == (None, None, None)
    tokens = torch.from_numpy(sequences.tokens_BL1).long()
    nats = -torch.log_softmax(_logits(module, tokens[:, :-1]), -1).gather(1, tokens[:, 1:].reshape(-1, 1))[:, 0]
    expected = nats[torch.from_numpy(sequences.mask_BL1[:, 1:].ravel())].mean()
    assert found.loss == pytest.approx(float(expected), abs=1e-6)  # float32 rows


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        # It is the divergence of the training, which may be JSD or that of chunks.
        (HeldOutFigures(1.5, kl=0.25), "loss 1.5000 nats/token, divergence from the teacher 0.2500"),
        (HeldOutFigures(1.5, teacher_ce=2.0), "loss 1.5000 nats/token, cross-entropy with the teacher 2.0000"),
        (HeldOutFigures(1.5), "loss 1.5000 nats/token"),
    ],
)
def test_figures_in_words_name_no_divergence_that_was_not_measured(figures: HeldOutFigures, words: str) -> None:
    assert figures.in_words() == words


def _taught(student, batch):
    """One that agrees with the teacher now and then, which fresh weights never do."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(10):
        logits_NV = student(input_ids=batch.input_ids_BL).logits.flatten(0, 1)
        torch.nn.functional.cross_entropy(logits_NV, batch.labels_BL.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


@pytest.fixture
def make_task(make_shards, tmp_path):
    """Six sequences of the twelve held-out ones are in the cache."""

    def make(kind: str | None, **settings) -> TrainingTask:
        scored = None
        if kind is not None:
            whole = make_shards(tmp_path / "scored", kind, 12, seed=1)
            half = whole.shard_set.model_copy(update={"shards": _first_blocks(whole.shard_set, 6)})
            scored = ShardReader(tmp_path / "scored", half)
        training = make_shards(tmp_path / "training", kind, 12)
        heldout = make_shards(tmp_path / "text", None, 12, seed=1)
        return tiny_task(tmp_path, training, heldout, settings, heldout_targets=scored)

    return make


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_figures_against_the_teacher_are_those_of_whole_logits(make_student, make_task, kind: str) -> None:
    task = make_task(kind, batch_sequences=4)
    batches = list(heldout_batches(task, 10))
    assert [(len(b.input_ids_BL), b.ids_NK is None) for b in batches] == [
        (4, False),
        (2, False),
        (4, True),
    ], "targets as far as there are, then the rest as text"
    module = _module(_taught(make_student(), batches[0]))
    found = measure(module, batches)
    kl = ce = agreed = rows = 0.0
    for batch in batches[:2]:
        logits_NV = _logits(module, batch.input_ids_BL)
        log_q_NK = torch.log_softmax(logits_NV, -1).gather(1, batch.ids_NK)
        weights_NK = batch.weights_NK.double()
        rows += len(logits_NV)
        agreed += int((logits_NV.argmax(1) == batch.ids_NK[torch.arange(len(logits_NV)), weights_NK.argmax(1)]).sum())
        ce -= float((weights_NK * log_q_NK).sum())
        if kind == "topk":
            tail_N = batch.tail_N.double()
            kl += float(torch.xlogy(weights_NK, weights_NK).sum() - (weights_NK * log_q_NK).sum())
            kl += float((torch.xlogy(tail_N, tail_N) - tail_N * (1 - log_q_NK.exp().sum(1)).log()).sum())
    assert found.top1 == pytest.approx(agreed / rows) and 0 < agreed < rows
    # rows of the loss are float32
    if kind == "sampled":
        assert found.kl is None and found.teacher_ce == pytest.approx(ce / rows, abs=1e-6)
    else:
        assert found.teacher_ce is None and found.kl == pytest.approx(kl / rows, abs=1e-6)
    text = heldout_batches(dataclasses.replace(task, heldout_targets=None), 10)
    assert found.loss == pytest.approx(measure(module, text).loss)


def test_the_cross_entropy_with_draws_has_the_mean_of_that_with_the_teacher(make_student, make_task, chain) -> None:
    """Where the KL with samples is too small by their missing entropy."""
    task = make_task("sampled", batch_sequences=6)
    (batch,) = heldout_batches(task, 6)
    module = _module(make_student())
    found = measure(module, [batch])
    p_NV = torch.softmax(chain.double(), -1)[batch.input_ids_BL.flatten()]
    ce_N = -(p_NV * torch.log_softmax(_logits(module, batch.input_ids_BL), -1)).sum(1)
    entropy_N = -(p_NV * p_NV.log()).sum(1)
    # 96 rows of 20 samples: the standard error is about a hundredth of a nat
    assert found.teacher_ce == pytest.approx(float(ce_N.mean()), abs=0.03)
    bias = float(entropy_N.mean() - entropies(batch).mean())
    assert bias > 0.05, "or this teacher would not show it"


def test_a_reverse_divergence_and_a_temperature_are_those_of_the_training(make_student, make_task) -> None:
    task = make_task("topk", batch_sequences=6)
    student = make_student()
    found = {
        (objective.divergence, temperature): measure(
            _module(student, temperature, objective), heldout_batches(task, 6)
        ).kl
        for objective in (Objective(), Objective("reverse_kl"))
        for temperature in (1.0, 2.0)
    }
    assert len({round(value, 4) for value in found.values()}) == 4


@pytest.mark.parametrize(
    ("asked", "num_steps", "num_measured"),
    # before, at step 200 of 400 and at the end: a tenth of the sequences that it trains on, between 8 and 64
    [(None, 400, 53), (None, 4000, 64), (None, 3, 8), (500, 3, 100), (2, 4000, 2)],
)
def test_measurements_of_a_short_training_read_little_of_what_it_reads(
    make_task, make_shards, tmp_path, asked, num_steps: int, num_measured: int
) -> None:
    task = make_task("topk", num_validation_sequences=asked, batch_sequences=4, validate_every_steps=200)
    task = dataclasses.replace(task, alpha=1.0, heldout=make_shards(tmp_path / "more", None, 100, seed=2))
    assert num_validation_sequences(task, num_steps) == num_measured


def test_the_top_k_tokens_are_found_chunk_by_chunk_and_padding_is_none(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = (torch.randn(n, 8, generator=generator) for n in (50, 33))
    bias_V = torch.randn(33, generator=generator)
    weight_VH[32] *= 100
    monkeypatch.setattr("capgap.pipeline.train.top_ids._TOP_ROWS", 7)
    monkeypatch.setattr("capgap.pipeline.train.top_ids._TOP_COLUMNS", 5)
    for bias in (None, bias_V):
        logits_NV = hidden_NH @ weight_VH.T + (0 if bias is None else bias)
        assert torch.equal(top_ids(hidden_NH, weight_VH, bias, 32), logits_NV[:, :32].argmax(1))
        assert not torch.equal(top_ids(hidden_NH, weight_VH, bias, 33), logits_NV[:, :32].argmax(1))
    same = torch.zeros(33, 8)
    assert top_ids(hidden_NH, same, None, 32).tolist() == [0] * 50
