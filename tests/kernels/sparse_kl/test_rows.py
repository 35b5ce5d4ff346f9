from __future__ import annotations

import pytest
import torch

from capgap.kernels.sparse_kl.rows import Rows, gradient_in_place


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_kept", [0, 2, 5])
def test_columns_past_the_vocabulary_end_at_exactly_zero(num_kept: int, temperature: float) -> None:
    rows = Rows(
        ids_BK=torch.arange(num_kept).expand(3, -1),
        weights_BK=torch.full((3, num_kept), 0.1),
        tail_B=torch.full((3,), 1 - 0.1 * num_kept),
        labels_B=torch.tensor([0, 1, 4]),
        kl_scale_B=torch.ones(3),
        ce_scale_B=torch.ones(3),
    )
    block_BP = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    block_BP[:, 5:] = torch.nan
    kl_B, ce_B = gradient_in_place(block_BP, 5, rows, temperature, want_gradient=True)
    assert (block_BP[:, 5:] == 0).all()
    assert torch.isfinite(block_BP).all() and torch.isfinite(kl_B).all() and torch.isfinite(ce_B).all()
    # a softmax minus a distribution sums to 0: five float32 roundings
    assert block_BP.sum(-1).abs().max() < 1e-6
