"""Logprobs of labels with their gradients, sums over chunks, and their divergence, held against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capgap.kernels.sparse_kl import SparseTargets, chunk_kl, chunk_sums, linear_label_logprobs, linear_sparse_kl

N, H, V = 23, 8, 37


def inputs(seed: int = 0, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VH = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(V, generator=generator, dtype=torch.float64, requires_grad=True) if bias else None
    labels_N = torch.randint(0, V - 2, (N,), generator=generator)
    labels_N[::5] = -100
    return hidden_NH, weight_VH, bias_V, labels_N


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
def test_logprobs_of_labels_and_their_gradients_are_those_of_plain_torch(softcap: float | None, bias: bool) -> None:
    hidden_NH, weight_VH, bias_V, labels_N = inputs(bias=bias)
    factors_N = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    factors_N[3] = 0
    every = [one for one in (hidden_NH, weight_VH, bias_V) if one is not None]
    # a workspace of a row or two: many chunks
    found_N = linear_label_logprobs(
        hidden_NH, weight_VH, labels_N, vocab_size=V - 2, bias_V=bias_V, softcap=softcap, workspace_mb=1
    )
    found = torch.autograd.grad((found_N * factors_N).sum(), every)
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)[:, : V - 2]
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    counts_N = labels_N >= 0
    expected_N = logits_NV.log_softmax(-1).gather(1, labels_N.clamp(0)[:, None])[:, 0].where(counts_N, 0.0)
    expected = torch.autograd.grad((expected_N * factors_N).sum(), every)
    torch.testing.assert_close(found_N, expected_N)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    hidden_NH, weight_VH, bias_V, labels_N = inputs()
    found_N = linear_label_logprobs(hidden_NH, weight_VH, labels_N, bias_V=bias_V)
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(found_N.sum(), hidden_NH, create_graph=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_with_one_tokenizer_the_loss_is_that_of_tokens_whose_other_ids_are_one_cell(divergence: str) -> None:
    hidden_NH, weight_VH, bias_V, labels_N = inputs()
    teacher_N = -torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5 - 0.01
    left_N = torch.zeros(N, dtype=torch.int64).where(labels_N >= 0, -1)
    every = (hidden_NH, weight_VH, bias_V)
    sums_N = chunk_sums(linear_label_logprobs(hidden_NH, weight_VH, labels_N, bias_V=bias_V), left_N)
    found_N = chunk_kl(teacher_N, sums_N, divergence=divergence).where(left_N == 0, 0.0)
    found = torch.autograd.grad(found_N.sum() / (labels_N >= 0).sum(), every)
    targets = SparseTargets(labels_N.clamp(0)[:, None], teacher_N.exp()[:, None], -torch.expm1(teacher_N))
    expected = linear_sparse_kl(
        hidden_NH, weight_VH, targets, labels_N, alpha=1.0, divergence=divergence, bias_V=bias_V
    )
    assert expected.kl_N is not None
    torch.testing.assert_close(found_N.detach(), expected.kl_N)
    for one, other in zip(found, torch.autograd.grad(expected.loss, every), strict=True):
        torch.testing.assert_close(one, other)


def test_a_chunks_logprob_is_the_sum_of_its_rows_and_stands_in_the_last() -> None:
    logprobs_N = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    left_N = torch.tensor([1, 0, -1, 0, -1])
    assert chunk_sums(logprobs_N, left_N).tolist() == [0, -3, 0, -8, 0]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_divergence_is_zero_for_equal_likelihoods_and_else_positive_and_finite(divergence: str) -> None:
    teacher_C = torch.tensor([-1e-9, -0.5, -30.0, -200.0, -0.0, -200.0])
    student_C = torch.tensor([-1e-9, -0.5, -30.0, -1e-9, -200.0, -1.0], requires_grad=True)
    for temperature in (1.0, 100.0):
        found_C = chunk_kl(teacher_C, student_C, temperature, divergence)
        assert found_C[:3].abs().max() < 1e-5 and (found_C > -1e-5).all() and found_C[3:].min() > 0.3
        (slope_C,) = torch.autograd.grad(found_C.sum(), student_C)
        assert slope_C.isfinite().all()


def test_at_a_high_temperature_a_long_chunk_is_learnt_that_has_no_likelihood_at_1() -> None:
    student_C = torch.tensor([-60.0], requires_grad=True)
    slopes = [
        float(torch.autograd.grad(chunk_kl(torch.tensor([-40.0]), student_C, t).sum(), student_C)[0]) for t in (1, 100)
    ]
    assert abs(slopes[0]) < 1e-12 and slopes[1] < -0.1
