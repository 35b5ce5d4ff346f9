"""What of the Triton kernel only a GPU can show: real sizes, streams, more than one device."""

from __future__ import annotations

import pytest
import torch
from sparse_kl_cases import make, run

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.backends import kernel_for
from capgap.kernels.sparse_kl.chunks import pitch
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference
from capgap.kernels.sparse_kl.rows import Rows, RowSettings
from capgap.kernels.sparse_kl.torch_rows import torch_rows

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU can be used")]

CUDA = torch.device("cuda")


def _rows(num_rows: int, vocab_size: int, top_k: int, device: torch.device = CUDA) -> Rows:
    generator = torch.Generator(device).manual_seed(0)
    first_N1 = torch.randint(vocab_size, (num_rows, 1), device=device, generator=generator)
    steps_K = torch.arange(top_k, device=device) * (vocab_size // top_k)
    ids_NK = ((first_N1 + steps_K) % vocab_size).sort(dim=-1).values.to(torch.int32)
    p_NK = torch.rand(num_rows, top_k, device=device, generator=generator) / top_k
    labels_N = torch.randint(vocab_size, (num_rows,), device=device, generator=generator)
    factors = torch.rand(2, num_rows, device=device, generator=generator)
    return Rows(ids_NK, p_NK, 1 - p_NK.sum(-1), labels_N, *factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_chosen_where_nothing_is_asked_for(dtype: torch.dtype) -> None:
    assert kernel_for("auto", CUDA, dtype) is kernel_for("triton", CUDA, dtype)
    assert kernel_for("auto", CUDA, torch.float64) is torch_rows


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (2.0, None), (2.0, 30.0)])
def test_rows_of_151936_logits_beyond_2_to_the_31_agree_with_float64(temperature, softcap, divergence) -> None:
    num_rows, vocab_size = 14_400, 151_936
    settings = RowSettings(vocab_size, temperature, divergence, 0.3, softcap)
    rows = _rows(num_rows, vocab_size, 64)
    generator = torch.Generator(CUDA).manual_seed(1)
    logits_NP = torch.empty(num_rows, pitch(vocab_size), dtype=torch.bfloat16, device=CUDA)
    assert logits_NP.numel() > 2**31
    logits_NP.normal_(std=3, generator=generator)
    looked_at = torch.tensor([0, 1, 7_000, 14_130, 14_134, 14_398, 14_399], device=CUDA)
    true_NP = logits_NP[looked_at].double()
    few = Rows(*(field[looked_at] for field in rows))
    few = Rows(*(field.double() if field.is_floating_point() else field for field in few))
    true = torch_rows(true_NP, few, settings, want_gradient=True)
    found = kernel_for("triton", CUDA, torch.bfloat16)(logits_NP, rows, settings, True)
    for a, b in zip(found, true, strict=True):
        # float32 sums of 151,936 terms, in another order
        torch.testing.assert_close(a[looked_at].double(), b, rtol=1e-5, atol=1e-5)
    # rounded once to bfloat16, of gradients that are off by float32 roundings of exp
    d_logits_NV = logits_NP[looked_at, :vocab_size].double()
    torch.testing.assert_close(d_logits_NV, true_NP[:, :vocab_size], rtol=2**-8 + 1e-5, atol=1e-9)
    assert (logits_NP[:, vocab_size:] == 0).all()


def test_nothing_waits_for_the_gpu() -> None:
    rows, settings = _rows(64, 5003, 20), RowSettings(5003, 2.0, "jsd", 0.5, None)
    logits_NP = torch.randn(64, pitch(5003), device=CUDA)
    kernel = kernel_for("auto", CUDA, torch.float32)
    kernel(logits_NP.clone(), rows, settings, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel(logits_NP, rows, settings, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeated_calls_give_the_same_bits_whatever_else_runs() -> None:
    rows, settings = _rows(2048, 32_001, 64), RowSettings(32_001, 2.0, "jsd", 0.5, None)
    logits_NP = torch.randn(2048, pitch(32_001), device=CUDA).to(torch.bfloat16)
    kernel = kernel_for("triton", CUDA, torch.bfloat16)
    first_NP, second_NP = logits_NP.clone(), logits_NP.clone()
    first = kernel(first_NP, rows, settings, True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy_NP = logits_NP.float() @ logits_NP.float().t()
    second = kernel(second_NP, rows, settings, True)
    torch.cuda.synchronize()
    assert busy_NP.isfinite().all()
    assert torch.equal(first_NP, second_NP)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_s_gradient_is_summed_in_float32_over_chunks(dtype: torch.dtype) -> None:
    case = make(4, num_rows=2500, width=64, vocab_size=1001, scale=4.0).on(CUDA).to(dtype)
    one, one_grads = run(linear_sparse_kl, case)
    many, many_grads = run(linear_sparse_kl, case, workspace_mb=1)
    true, true_grads = run(reference, case.to(torch.float64))
    for result, grads in ((one, one_grads), (many, many_grads)):
        torch.testing.assert_close(result.loss.double(), true.loss, rtol=1e-2, atol=0)
        for grad, true_grad in zip(grads, true_grads, strict=True):
            # logits of 4 and their gradients are rounded to 8 bits, or 11: a product of many averages it out
            assert (grad.double() - true_grad).norm() <= 0.02 * true_grad.norm()
    # chunks change nothing but the order of float32 sums, then one rounding of the result
    assert (many_grads[1].float() - one_grads[1].float()).norm() <= 2**-9 * one_grads[1].float().norm()


def test_the_kernel_and_torch_give_one_loss_and_one_gradient() -> None:
    generator = torch.Generator(CUDA).manual_seed(0)
    hidden_NH = torch.randn(700, 256, device=CUDA, generator=generator).to(torch.bfloat16)
    weight_VH = torch.randn(32_001, 256, device=CUDA, generator=generator).to(torch.bfloat16) / 16
    rows = _rows(700, 32_001, 50)
    targets = SparseTargets(rows.ids_NK.long(), rows.p_NK, rows.p_tail_N)
    results = []
    for backend in ("triton", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden_NH, weight_VH)]
        loss = linear_sparse_kl(
            *leaves, targets, rows.labels_N, alpha=0.5, temperature=2.0, workspace_mb=16, backend=backend
        ).loss
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        # one bfloat16 rounding of a gradient may fall the other way
        assert (a - b).float().norm() <= 2**-8 * b.float().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
def test_it_runs_on_the_device_of_its_logits() -> None:
    case = make(3, num_rows=5).to(torch.float32)
    results = [run(linear_sparse_kl, case.on(torch.device(f"cuda:{index}")), backend="triton") for index in range(2)]
    (first, first_grads), (second, second_grads) = results
    assert torch.equal(first.loss.cpu(), second.loss.cpu())
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first_grads, second_grads, strict=True))
