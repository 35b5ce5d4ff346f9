from __future__ import annotations

import pytest
import torch

from capgap.kernels.sampling.largest import _among_candidates, largest


def _rows(vocab_size: int) -> torch.Tensor:
    return torch.randn(12, vocab_size, generator=torch.Generator().manual_seed(1))


def _require_those_of_torch(rows_NV: torch.Tensor, top_k: int) -> None:
    kept_NK, ids_NK = largest(rows_NV, top_k)
    expected_NK = rows_NV.topk(top_k).values
    assert kept_NK.dtype == rows_NV.dtype and ids_NK.dtype == torch.int64
    assert torch.equal(kept_NK.nan_to_num(), expected_NK.nan_to_num())
    assert torch.equal(rows_NV.gather(1, ids_NK).nan_to_num(), expected_NK.nan_to_num())
    assert all(len(set(row)) == top_k for row in ids_NK.tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 2, 17, 64, 300, 999, 1000])
@pytest.mark.parametrize("vocab_size", [1000, 4099])
def test_the_largest_are_those_of_torch(vocab_size: int, top_k: int, dtype: torch.dtype) -> None:
    _require_those_of_torch(_rows(vocab_size).to(dtype), top_k)


def test_numbers_that_float32_cannot_tell_apart_are_told_apart_in_float64() -> None:
    rows_NV = 1 + torch.stack([torch.randperm(4096, generator=torch.Generator().manual_seed(i)) for i in range(9)]) * (
        torch.tensor(1e-12, dtype=torch.float64)
    )
    _require_those_of_torch(rows_NV, 64)


def test_columns_behind_the_rows_are_not_looked_at() -> None:
    wide = _rows(1200)
    wide[:, 1000:] = 9.0
    _require_those_of_torch(wide[:, :1000], 17)
    assert largest(wide[:, :1000], 17)[1].max() < 1000


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 0.0], ids=str)
def test_rows_of_many_equals_or_no_numbers_are_found_in_one_step(value: float) -> None:
    rows_NV = _rows(4096)
    assert _among_candidates(rows_NV, 17, 15) is not None
    rows_NV[3, 5:] = value
    assert _among_candidates(rows_NV, 17, 15) is None
    _require_those_of_torch(rows_NV, 17)


def test_a_few_that_are_no_numbers_disturb_no_other_row() -> None:
    rows_NV = _rows(4096)
    expected_NK, _ = largest(rows_NV, 17)
    rows_NV[3, 100:120] = torch.nan
    kept_NK, ids_NK = largest(rows_NV, 17)
    others = [row for row in range(12) if row != 3]
    assert torch.equal(kept_NK[others], expected_NK[others])
    assert ids_NK.min() >= 0 and ids_NK.max() < 4096


def test_no_rows_have_no_largest() -> None:
    kept_NK, ids_NK = largest(torch.empty(0, 4096), 17)
    assert kept_NK.shape == ids_NK.shape == (0, 17)


def test_a_row_that_needs_a_gradient_is_taken_as_it_is() -> None:
    rows_NV = _rows(1000).requires_grad_()
    assert not largest(rows_NV, 17)[1].is_floating_point()
