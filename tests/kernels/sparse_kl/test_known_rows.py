"""Single rows whose loss and gradient are known, at the ends of what float32 can hold."""

from __future__ import annotations

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
