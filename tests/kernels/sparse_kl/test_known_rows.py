"""Single rows whose loss and gradient are known, at the ends of what float32 can hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from capgap.kernels.sparse_kl import SparseKl, SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference


def _of_logits(op, logits_NV: Tensor, targets: SparseTargets, **settings) -> tuple[SparseKl, Tensor]:
    """Result at alpha 1 and gradient of the logits: the head is the identity."""
    logits_NV = logits_NV.clone().requires_grad_()
    head_VV = torch.eye(logits_NV.shape[1], dtype=logits_NV.dtype)
    result = op(logits_NV, head_VV, targets, torch.zeros(len(logits_NV)).long(), alpha=1.0, **settings)
    return result, torch.autograd.grad(result.loss, logits_NV)[0]


@pytest.mark.parametrize("label_probability", [0.9, 0.99, 0.999, 0.99999])
def test_a_confident_label_keeps_its_gradient(label_probability: float) -> None:
    rest = (1 - label_probability) / 9
    logits_NV = torch.full((1, 10), rest, dtype=torch.float64).log()
    logits_NV[0, 3] = torch.tensor(label_probability, dtype=torch.float64).log()
    targets = SparseTargets(torch.tensor([[3]]), torch.ones(1, 1))
    hidden_NH = logits_NV.float().requires_grad_()  # the head is the identity, so this is the gradient of the logits
    linear_sparse_kl(hidden_NH, torch.eye(10), targets, torch.tensor([3]), alpha=0.0).loss.backward()
    # 1 - q in float32: half a unit of 6e-8 and a few roundings of the logits, against 1e-5
    assert hidden_NH.grad[0, 3].item() == pytest.approx(label_probability - 1, rel=0.03)
    assert hidden_NH.grad[0, 4].item() == pytest.approx(rest, rel=1e-5)


@pytest.mark.parametrize("gap", [20.0, 80.0, 300.0])
def test_a_student_tail_too_small_for_float32_still_pulls(gap: float) -> None:
    # at a gap of 20 the tail is 4e-9 and 1 - sum(q) is all rounding; at 300 it underflows
    logits_NV = torch.zeros(1, 12)
    logits_NV[0, 4:] = -gap
    targets = SparseTargets(torch.tensor([[0, 1, 2, 3]]), torch.full((1, 4), 0.2), torch.tensor([0.2]))
    fast, fast_grad = _of_logits(linear_sparse_kl, logits_NV, targets)
    true, true_grad = _of_logits(reference, logits_NV.double(), targets)
    # a logprob of 300 has a rounding of 1.5e-5, the gradients stand on their own
    torch.testing.assert_close(fast.kl_N, true.kl_N, rtol=1e-6, atol=0, check_dtype=False)
    torch.testing.assert_close(fast_grad, true_grad, rtol=1e-5, atol=0, check_dtype=False)
    assert (fast_grad[0, 4:] < -0.02).all()


def test_a_perfect_student_has_no_kl_and_no_gradient() -> None:
    logits_NV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs_NV = torch.softmax(logits_NV / 2, -1)
    weights_NK, ids_NK = probs_NV.topk(8)
    targets = SparseTargets(ids_NK, weights_NK, 1 - weights_NK.sum(-1))
    result, grad = _of_logits(linear_sparse_kl, logits_NV, targets, temperature=2.0)
    # float64 rounding of terms of order 1
    assert result.kl_N.abs().max() < 1e-14
    assert grad.abs().max() < 1e-15


@pytest.mark.parametrize("op", [linear_sparse_kl, reference], ids=["fast", "reference"])
@pytest.mark.parametrize(
    ("tail", "p_V", "rest"),
    [
        ("drop", [0.5, 0.2, 0, 0], None),
        ("renorm", [5 / 7, 2 / 7, 0, 0], None),
        ("label", [0.5, 0.2, 0.3, 0], None),
        ("ghost", [0.5, 0.2, 0, 0], 0.3),
    ],
)
def test_each_tail_is_what_it_is_called(op, tail: str, p_V: list[float], rest: float | None) -> None:
    logits_NV = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    q_V = torch.softmax(logits_NV[0], -1)
    targets = SparseTargets.topk(
        torch.tensor([[0, 1, 3]]),
        torch.tensor([[0.5, 0.2, 0.0]], dtype=torch.float64).log(),
        torch.tensor([0.3], dtype=torch.float64),
    )
    kl_N = op(logits_NV, torch.eye(4).double(), targets, torch.tensor([2]), alpha=1.0, tail=tail).kl_N
    expected = sum(p * math.log(p / q) for p, q in zip(p_V, q_V.tolist(), strict=True) if p)
    if rest is not None:
        expected += rest * math.log(rest / (q_V[2] + q_V[3]).item())
    # float64, three terms
    assert kl_N.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("op", [linear_sparse_kl, reference], ids=["fast", "reference"])
@pytest.mark.parametrize(("divergence", "beta"), [("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_each_divergence_is_its_definition(op, divergence: str, beta: float) -> None:
    logits_NV = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    q_V = torch.softmax(logits_NV[0] / 2, -1).tolist()
    p, q = [0.5, 0.2, 0.3], [q_V[0], q_V[1], q_V[2] + q_V[3]]
    targets = SparseTargets(
        torch.tensor([[0, 1]]),
        torch.tensor([[0.5, 0.2]], dtype=torch.float64),
        torch.tensor([0.3], dtype=torch.float64),
    )

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    mixture = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    expected = kl(q, p) if divergence == "reverse_kl" else beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    settings = {"alpha": 1.0, "temperature": 2.0, "divergence": divergence, "beta": beta}
    result = op(logits_NV, torch.eye(4).double(), targets, torch.tensor([2]), **settings)
    # float64, six terms
    assert result.kl_N.item() == pytest.approx(expected, rel=1e-12)
    assert result.loss.item() == pytest.approx(4 * expected, rel=1e-12)


@pytest.mark.parametrize("tail", [0.0, 1e-30])
def test_a_teacher_without_a_tail_leaves_the_reverse_kl_finite(tail: float) -> None:
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.full((1, 2), 0.5), torch.tensor([tail]))
    logits_NV = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    result, grad = _of_logits(linear_sparse_kl, logits_NV, targets, divergence="reverse_kl")
    q_V = torch.softmax(logits_NV[0].double(), -1)
    rest = (q_V[2] + q_V[3]).item()
    expected = 2 * q_V[0].item() * math.log(q_V[0].item() / 0.5) + rest * (math.log(rest) + 30)
    # float32, terms of up to 30
    assert result.kl_N.item() == pytest.approx(expected, rel=1e-5)
    assert (grad[0, 2:] > 0).all() and (grad[0, :2] < 0).all()


@pytest.mark.parametrize("tail", ["drop", "renorm", "ghost"])
def test_a_row_without_a_kept_id_pulls_nowhere(tail: str) -> None:
    targets = SparseTargets.topk(
        torch.tensor([[-1, 7, 2]]), torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([1.0])
    )
    logits_NV = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    result, grad = _of_logits(linear_sparse_kl, logits_NV, targets, tail=tail)
    assert result.kl_N.item() == 0
    assert (grad == 0).all()


def test_counts_are_frequencies() -> None:
    targets = SparseTargets.sampled(torch.tensor([[3, 1, 0]]), torch.tensor([[5, 3, 0]]), num_samples=8)
    assert targets.recording == "sampled" and targets.tail_N is None
    assert targets.weights_NK.tolist() == [[0.625, 0.375, 0.0]]


@pytest.mark.parametrize(("divergence", "tail"), [("forward_kl", "ghost"), ("reverse_kl", "ghost"), ("jsd", "label")])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_odd_vocabulary_of_a_real_size(temperature: float, divergence: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(3, 64, generator=generator).requires_grad_()
    weight_VH = (torch.randn(50257, 64, generator=generator) / 4).requires_grad_()
    weights_NK, ids_NK = torch.softmax(5 * torch.randn(3, 50257, generator=generator), -1).topk(50)
    targets = SparseTargets(ids_NK, weights_NK, 1 - weights_NK.sum(-1))
    labels_N, settings = torch.tensor([0, 50256, 7]), {"alpha": 0.5, "temperature": temperature}
    exact = tuple(x.detach().double().requires_grad_() for x in (hidden_NH, weight_VH))
    settings |= {"divergence": divergence, "tail": tail}
    fast = linear_sparse_kl(hidden_NH, weight_VH, targets, labels_N, **settings)
    true = reference(*exact, targets, labels_N, **settings)
    fast_grads = torch.autograd.grad(fast.loss, (hidden_NH, weight_VH))
    # float32 sums of 50257 terms
    torch.testing.assert_close(fast.kl_N, true.kl_N, rtol=1e-5, atol=1e-6, check_dtype=False)
    for fast_grad, true_grad in zip(fast_grads, torch.autograd.grad(true.loss, exact), strict=True):
        assert (fast_grad - true_grad).norm() <= 1e-5 * true_grad.norm()
