from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import SIZES, tiny_llama, tiny_model
from transformers import CohereConfig, Gemma2Config

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.pipeline.store import Batch
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.rows import in_rows
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.online import HeadWeights, OnlineModule, full_divergence, linear_full_kl
from capgap.schemas.run_optimization import OptimizationSettings

VOCAB_SIZE = 40
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


@pytest.fixture(scope="module")
def batch(make_shards, tmp_path_factory) -> Batch:
    sequences, targets = make_shards(tmp_path_factory.mktemp("cache"), "sampled", 12).read(0)
    sequences.mask_BL1[1, 5:9] = False
    return collate([(sequences, targets, row) for row in range(4)], 20)


@pytest.fixture
def teacher(make_student):
    """Another model than any student, and sharper."""
    model = make_student(7, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


PLAIN = Objective()


def _module(model, teacher, alpha=1.0, temperature=1.0, objective=PLAIN) -> OnlineModule:
    return OnlineModule(
        model, OptimizationSettings(), 10, alpha, temperature, VOCAB_SIZE, objective, teacher=copy.deepcopy(teacher)
    )


def _divergence(p_V: torch.Tensor, q_V: torch.Tensor, name: str, beta: float) -> torch.Tensor:
    """By the definitions, from probabilities."""
    if name == "forward_kl":
        return (p_V * (p_V / q_V).log()).sum()
    if name == "reverse_kl":
        return (q_V * (q_V / p_V).log()).sum()
    m_V = beta * p_V + (1 - beta) * q_V
    return beta * (p_V * (p_V / m_V).log()).sum() + (1 - beta) * (q_V * (q_V / m_V).log()).sum()


def _plain_loss(model, teacher, batch: Batch, alpha, temperature, objective: Objective) -> torch.Tensor:
    """From the models' own full logits, row by row, in float64."""
    student_NV = model(input_ids=batch.input_ids_BL).logits.flatten(0, 1)[:, :VOCAB_SIZE].double()
    with torch.no_grad():
        teacher_NV = teacher(input_ids=batch.input_ids_BL).logits.flatten(0, 1)[:, :VOCAB_SIZE].double()
    losses = []
    for student_V, teacher_V, label in zip(student_NV, teacher_NV, batch.labels_BL.flatten().tolist(), strict=True):
        if label < 0:
            continue
        p_V, q_V = (torch.softmax(logits_V / temperature, -1) for logits_V in (teacher_V, student_V))
        kl = _divergence(p_V, q_V, objective.divergence, objective.beta)
        ce = -torch.log_softmax(student_V, -1)[label]
        losses.append(alpha * temperature**2 * kl + (1 - alpha) * ce)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha, temperature, tied", [(1.0, 1.0, True), (0.4, 2.0, False)])
def test_loss_and_gradients_are_those_of_full_logits(
    batch, make_student, teacher, divergence, alpha, temperature, tied
) -> None:
    model, objective = make_student(tied=tied), Objective(divergence, beta=0.3)
    module = _module(model, teacher, alpha, temperature, objective)
    module.training_step(batch, 0).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected = _plain_loss(model, teacher, batch, alpha, temperature, objective)
    expected.backward()
    # float32 against float64 from the logits on: 1e-7 of a few nats, summed over 60 rows
    assert module.last.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=2e-6, rtol=1e-4), name
    head = found["lm_head.weight" if not tied else "model.embed_tokens.weight"]
    assert head[:VOCAB_SIZE].any() and not head[VOCAB_SIZE:].any(), "padding rows are never trained"


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """23 rows in float64: student of width 6 and 3 rows of padding, teacher of width 5 and none; two rows masked."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels_N = torch.randint(0, 11, (23,), generator=generator)
    labels_N[[4, 17]] = -100
    return {
        "hidden": draw(23, 6).requires_grad_(),
        "weight": draw(14, 6).requires_grad_(),
        "bias": draw(14).requires_grad_(),
        "teacher_hidden": draw(23, 5),
        "teacher_weight": 3 * draw(11, 5),
        "labels": labels_N,
    }


def _full(rows, **settings):
    return linear_full_kl(
        rows["hidden"],
        HeadWeights(rows["weight"], rows["bias"], 4.0),
        rows["teacher_hidden"],
        HeadWeights(rows["teacher_weight"]),
        rows["labels"],
        vocab_size=11,
        **settings,
    )


def _grads(rows, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [rows["hidden"], rows["weight"], rows["bias"]]))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_it_is_the_sparse_loss_with_every_id_kept(rows, divergence) -> None:
    logits_NV = rows["teacher_hidden"] @ rows["teacher_weight"].T
    # the sparse loss knows targets at one temperature: those of the teacher's softmax at it
    logprobs_NV = torch.log_softmax(logits_NV / 2.0, -1)
    targets = SparseTargets.topk(torch.arange(11).expand(23, 11).contiguous(), logprobs_NV, torch.zeros(23).double())
    expected = linear_sparse_kl(
        rows["hidden"],
        rows["weight"],
        targets,
        rows["labels"],
        alpha=0.7,
        temperature=2.0,
        divergence=divergence,
        tail="ghost",
        beta=0.2,
        vocab_size=11,
        bias_V=rows["bias"],
        softcap=4.0,
    )
    found = _full(rows, alpha=0.7, temperature=2.0, divergence=divergence, beta=0.2, chunk_rows=5)
    # both in float64; the sums run in another order
    for ours, theirs in zip(
        (*found, *_grads(rows, found.loss)), (*expected, *_grads(rows, expected.loss)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_size_of_a_chunk_changes_nothing(rows) -> None:
    whole = _full(rows, alpha=0.5)
    expected = _grads(rows, whole.loss)
    for chunk_rows in (1, 4, 21, 100):
        found = _full(rows, alpha=0.5, chunk_rows=chunk_rows)
        for ours, theirs in zip((*found, *_grads(rows, found.loss)), (*whole, *expected), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_logits_of_one_chunk_stand_in_memory_at_a_time() -> None:
    num_rows, vocab_size, chunk_rows = 512, 4096, 32
    hidden_NH, weight_VH = torch.randn(num_rows, 4, requires_grad=True), torch.randn(vocab_size, 4)
    labels_N = torch.zeros(num_rows, dtype=torch.int64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        head = HeadWeights(weight_VH)
        linear_full_kl(
            hidden_NH, head, hidden_NH.detach(), head, labels_N, alpha=1.0, chunk_rows=chunk_rows
        ).loss.backward()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    # the largest tensor is a chunk's logits; all logits would be 16 times as large
    assert max(changes) <= 1.1 * chunk_rows * vocab_size * 4
    standing = peak = 0
    for change in changes:
        standing += change
        peak = max(peak, standing)
    assert peak < 12 * chunk_rows * vocab_size * 4 < num_rows * vocab_size * 4


def test_without_a_row_that_counts_the_loss_is_0(rows) -> None:
    found = _full(rows | {"labels": torch.full((23,), -100)}, alpha=0.5)
    assert found.loss.item() == 0 and not found.kl_N.any() and not found.ce_N.any()
    assert not any(grad.any() for grad in _grads(rows, found.loss))


def test_ids_without_any_probability_cost_nothing_forward_and_30_nats_at_most_backward() -> None:
    logq_1V = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), -1)
    logp_1V = torch.tensor([[-2000.0, -0.7, -0.6864]], dtype=torch.float64)
    forward = full_divergence(logp_1V, logq_1V, "forward_kl", 0.5)
    assert float(forward) == pytest.approx(float((logp_1V.exp() * (logp_1V - logq_1V))[0, 1:].sum()))
    reverse = full_divergence(logp_1V, logq_1V, "reverse_kl", 0.5)
    assert 0 < float(reverse) < 30


def test_a_teacher_with_a_soft_cap_a_bias_and_its_own_width(batch, make_student) -> None:
    wide = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "head_dim": 24, "initializer_range": 0.5}
    shape = SIZES | wide | {"num_key_value_heads": 2}
    capped = tiny_model(Gemma2Config(**shape, final_logit_softcapping=2.0), 1).eval()
    biased = tiny_llama(2, **wide).eval()
    biased.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0)))
    config = CohereConfig(**shape, logit_scale=0.25, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    scaled = tiny_model(config, 3).eval()
    for teacher in (capped, biased, scaled):
        model = make_student()
        found = _module(model, teacher).loss(batch, 1.0).loss
        expected = _plain_loss(model, teacher, batch, 1.0, 1.0, PLAIN)
        # as above
        assert found.item() == pytest.approx(expected.item(), rel=2e-6)


def test_rows_of_several_sequences_have_the_loss_of_the_sequences(batch, make_student, teacher) -> None:
    model = make_student()
    expected = _module(model, teacher).loss(batch, 1.0)
    found = _module(model, teacher).loss(in_rows(batch, 32), 1.0)
    # sums of attention in another order: float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_teacher_is_frozen_and_no_part_of_the_module(batch, make_student, teacher) -> None:
    teacher.train()
    module = _module(make_student(), teacher)
    plain = DistillationModule(make_student(), OptimizationSettings(), 10, 1.0, 1.0, VOCAB_SIZE)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    held = module._teacher[0]
    module.train()
    module.training_step(batch, 0).backward()
    assert not held.training, "dropout would blur its distribution"
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in held.parameters())


def test_at_alpha_0_the_loss_is_the_cross_entropy_of_the_module(batch, make_student, teacher) -> None:
    model = make_student()
    found = _module(model, teacher).loss(batch, 0.0)
    expected = DistillationModule(model, OptimizationSettings(), 10, 0.0, 1.0, VOCAB_SIZE).loss(batch, 0.0)
    assert torch.equal(found.loss, expected.loss) and found.kl_N is None
