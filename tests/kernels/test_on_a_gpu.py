"""The kernels on a GPU agree with their float64 references, as they do on a CPU."""

from __future__ import annotations

import pytest
import torch

from capgap.kernels.sampling import reference as sampling_reference
from capgap.kernels.sampling import sampled_rows, topk_rows
from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl import reference as sparse_kl_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU can be used")]


def test_the_loss_and_its_gradients_agree_with_the_reference() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_NH = torch.randn(300, 64, device="cuda", generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(1001, 64, device="cuda", generator=generator, dtype=torch.float64) / 8
    ids_NK = torch.randint(1001, (300, 20), device="cuda", generator=generator)
    labels_N = torch.randint(1001, (300,), device="cuda", generator=generator)
    targets = SparseTargets(ids_NK, torch.full((300, 20), 0.045, device="cuda"), torch.full((300,), 0.1, device="cuda"))
    found, expected = [], []
    for compute, dtype, kept in (
        (linear_sparse_kl, torch.float32, found),
        (sparse_kl_reference.linear_sparse_kl, torch.float64, expected),
    ):
        hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden_NH, weight_VH))
        loss = compute(hidden, weight, targets, labels_N, alpha=0.5, temperature=2.0, vocab_size=1000).loss
        loss.backward()
        kept += [loss.detach().double(), hidden.grad.double(), weight.grad.double()]
    for a, b in zip(found, expected, strict=True):
        # float32 products of 64 terms, in which a GPU may use TF32 only if it is asked to
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_rows_agree_with_the_reference() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits_NV = 4 * torch.randn(200, 50257, device="cuda", generator=generator)
    labels_N = torch.randint(50000, (200,), device="cuda", generator=generator)
    offsets_N = torch.rand(200, device="cuda", generator=generator)
    kept = topk_rows(logits_NV, labels_N, 64, vocab_size=50000)
    truth = sampling_reference.topk_rows(logits_NV, labels_N, 64, vocab_size=50000)
    # float32 log-softmax over 50,000 terms
    assert torch.allclose(kept.logprobs_NK.double(), truth.logprobs_NK.double(), atol=1e-4)
    assert torch.allclose(kept.tail_N.double(), truth.tail_N.double(), rtol=1e-3)
    drawn = sampled_rows(logits_NV, labels_N, offsets_N, 50, vocab_size=50000)
    expected = sampling_reference.sampled_rows(logits_NV, labels_N, offsets_N, 50, vocab_size=50000)
    # of 10,000 points a few lie within float32 rounding of an id's border
    assert (drawn.samples_Nn != expected.samples_Nn).float().mean() < 1e-2
