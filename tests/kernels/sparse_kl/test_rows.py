"""The rows kernel by itself: what it writes, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from capgap.kernels.sparse_kl.backends import kernel_for
from capgap.kernels.sparse_kl.chunks import has_wide_products
from capgap.kernels.sparse_kl.rows import Rows, RowSettings
from capgap.kernels.sparse_kl.torch_rows import torch_rows


def _rows(top_k: int, dtype: torch.dtype = torch.float32) -> Rows:
    return Rows(
        ids_NK=torch.arange(top_k, dtype=torch.int32).expand(3, -1).contiguous(),
        p_NK=torch.full((3, top_k), 0.1, dtype=dtype),
        p_tail_N=torch.full((3,), 1 - 0.1 * top_k, dtype=dtype),
        labels_N=torch.tensor([0, 1, 4]),
        ckl_N=torch.ones(3, dtype=dtype),
        cce_N=torch.ones(3, dtype=dtype),
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 2, 5])
def test_nothing_past_the_vocabulary_is_read(top_k: int, temperature: float, divergence, softcap) -> None:
    settings = RowSettings(5, temperature, divergence, 0.5, softcap)
    kernel = kernel_for("auto", torch.device("cpu"), torch.float32)
    logits_NP = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for filling in (torch.nan, 1e30):
        chunk_NP = logits_NP.clone()
        chunk_NP[:, 5:] = filling
        kl_N, ce_N = kernel(chunk_NP, _rows(top_k), settings, want_gradient=True)
        results.append([kl_N, ce_N, chunk_NP[:, :5]])
    assert all(torch.isfinite(tensor).all() for tensor in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if softcap is None:
        # a softmax minus a distribution sums to 0, for each of the two losses: ten float32 roundings
        assert results[0][2].sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    settings = RowSettings(5, 2.0, "jsd", 0.3, None)
    kernel = kernel_for("torch", torch.device("cpu"), dtype)
    low_NP = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    full_NP = low_NP.float()
    low, full = (kernel(logits_NP, _rows(2), settings, want_gradient=True) for logits_NP in (low_NP, full_NP))
    assert torch.equal(low[0], full[0]) and torch.equal(low[1], full[1])
    assert torch.equal(low_NP[:, :5], full_NP[:, :5].to(dtype))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend: got 'cuda' on cpu, expected auto, torch or triton"):
        kernel_for("cuda", torch.device("cpu"), torch.float32)


def test_a_gpu_of_amd_s_takes_the_kernel_in_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    cuda = torch.device("cuda")
    assert kernel_for("auto", cuda, torch.bfloat16) is torch_rows
    assert not has_wide_products(cuda)
    with pytest.raises(ValueError, match=r"backend: got 'triton' on cuda .* is for NVIDIA's GPUs"):
        kernel_for("triton", cuda, torch.bfloat16)
