"""Logits of a 16-bit head are sums in float32, and no float32 copy of the head is made for them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama

from capgap.pipeline.models import head_product
from capgap.pipeline.models.head_product import float32_logits, sum_head_in_float32

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_they_are_those_of_a_widened_head(monkeypatch, device: str, dtype: torch.dtype, with_bias: bool) -> None:
    monkeypatch.setattr(head_product, "_BLOCK_ELEMENTS", 8 * 100)  # blocks of 100 columns, the last one of 57
    generator = torch.Generator().manual_seed(0)
    hidden_BLH, weight_VH = (torch.randn(*n, 8, generator=generator).to(device, dtype) for n in ((3, 5), (257,)))
    bias_V = torch.randn(257, generator=generator).to(device, dtype) if with_bias else None
    logits_BLV = float32_logits(hidden_BLH, weight_VH, bias_V)
    assert logits_BLV.shape == (3, 5, 257) and logits_BLV.dtype == torch.promote_types(dtype, torch.float32)
    expected = hidden_BLH.double() @ weight_VH.double().T + (0 if bias_V is None else bias_V.double())
    # eight exact products, summed in float32 at least
    assert torch.allclose(logits_BLV.double(), expected, rtol=0, atol=8 * 2.0**-22)


def test_hidden_states_that_a_model_keeps_wider_are_not_rounded() -> None:
    hidden_NH, weight_VH = torch.randn(4, 8), torch.randn(33, 8).bfloat16()
    assert torch.equal(float32_logits(hidden_NH, weight_VH), hidden_NH @ weight_VH.float().T)


def test_no_copy_of_the_whole_head_stands_in_memory(monkeypatch) -> None:
    monkeypatch.setattr(head_product, "_BLOCK_ELEMENTS", 2**14)
    hidden_NH, weight_VH = torch.randn(2, 64).bfloat16(), torch.randn(2**14, 64).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        float32_logits(hidden_NH, weight_VH)
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    # the logits, and a block; the head in float32 would be 4 MiB
    assert max(changes) == 2 * 2**14 * 4


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_s_own_logits_become_those_and_its_weights_stay(tied: bool) -> None:
    model = tiny_llama(vocab_size=300, tie_word_embeddings=tied).bfloat16().eval()
    head, ids_BL = model.get_output_embeddings().weight, torch.tensor([[1, 2, 3]])
    hidden_BLH = model.base_model(input_ids=ids_BL).last_hidden_state
    sum_head_in_float32(model)
    sum_head_in_float32(model)
    assert model.get_output_embeddings().weight is head and head.dtype == torch.bfloat16
    assert torch.equal(model(input_ids=ids_BL).logits, (hidden_BLH.float() @ head.float().T))
