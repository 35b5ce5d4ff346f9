"""What of a training step only a GPU can show: that nothing in it waits for the device."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import tiny_llama

from capgap.pipeline.store import Batch
from capgap.pipeline.train.module import DistillationModule
from capgap.schemas.run_optimization import OptimizationSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU can be used")]


def _batch(num_masked: int, documents: bool) -> Batch:
    tokens_BL1 = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(1))
    labels_BL = tokens_BL1[:, 1:].clone()
    labels_BL[0, :num_masked] = -100
    weights_NK = torch.softmax(torch.arange(4.0), -1).expand(32, 4).contiguous()
    positions_BL = torch.arange(8).repeat(2, 2) if documents else None
    ids_NK, tail_N = torch.arange(4).expand(32, 4).contiguous(), torch.full((32,), 0.0)
    return Batch(tokens_BL1[:, :-1], labels_BL, ids_NK, weights_NK, tail_N, positions_BL, 32 - num_masked).to("cuda")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("num_masked", [0, 5])
def test_a_whole_training_step_never_waits_for_the_device(num_masked: int, documents: bool, precision: str) -> None:
    settings = OptimizationSettings(precision=precision)
    module = DistillationModule(tiny_llama(0).cuda(), settings, 10, 0.5, 1.0, 40, num_micro_batches=2).train()
    made = module.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    batch = _batch(num_masked, documents)

    def step() -> None:
        for number in range(2):
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss = module.training_step(batch, number)
            loss.backward()
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    step()  # moments are made and kernels compiled
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [str(one.message) for one in found if "synchroniz" in str(one.message)] == []
