from __future__ import annotations

import pytest
import torch

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_NH": torch.zeros(1, 3, 2)}, r"hidden_NH: got \[1, 3, 2\] torch.float32 on cpu, expected \[N, H\]"),
        ({"hidden_NH": torch.zeros(3, 2).long()}, r"hidden_NH: got \[3, 2\] torch.int64"),
        ({"weight_VH": torch.zeros(5, 3)}, r"weight_VH: got \[5, 3\] .*, expected \[V, 2\]"),
        ({"weight_VH": torch.zeros(5, 2).long()}, r"weight_VH: got \[5, 2\] torch.int64"),
        ({"bias_V": torch.zeros(4)}, r"bias_V: got \[4\] .*, expected \[5\]"),
        ({"targets": SparseTargets(torch.zeros(4, 1).long(), torch.zeros(4, 1))}, r"targets.ids_NK: got \[4, 1\]"),
        ({"labels_N": torch.zeros(3)}, r"labels_N: got \[3\] torch.float32"),
        ({"labels_N": torch.zeros(3, dtype=torch.int32)}, r"labels_N: got \[3\] torch.int32"),
        ({"labels_N": torch.zeros(2).long()}, r"labels_N: got \[2\] torch.int64 on cpu, expected \[3\]"),
        ({"row_weights_N": torch.zeros(3, 1)}, r"row_weights_N: got \[3, 1\]"),
        ({"alpha": 1.1}, r"alpha: got 1.1, expected a number in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"vocab_size": 6}, "vocab_size: got 6, expected 1 to 5"),
        ({"vocab_size": 0}, "vocab_size: got 0, expected 1 to 5"),
        ({"labels_N": torch.zeros(3, device="meta").long()}, "labels_N: got meta, expected cpu"),
    ],
)
@pytest.mark.parametrize("op", [linear_sparse_kl, reference], ids=["fast", "reference"])
def test_what_does_not_fit_is_refused_with_what_was_got(op, changed: dict, message: str) -> None:
    arguments = {
        "hidden_NH": torch.zeros(3, 2),
        "weight_VH": torch.zeros(5, 2),
        "targets": SparseTargets(torch.zeros(3, 1).long(), torch.ones(3, 1)),
        "labels_N": torch.zeros(3).long(),
        "alpha": 0.5,
    }
    with pytest.raises(ValueError, match=message):
        op(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight_VH": torch.zeros(5, 2).bfloat16()}, "got torch.bfloat16, expected torch.float32"),
        ({"workspace_mb": 0}, "workspace_mb: got 0, expected at least 1"),
    ],
)
def test_the_fast_form_refuses_what_only_it_cannot_do(changed: dict, message: str) -> None:
    arguments = {"weight_VH": torch.zeros(5, 2)} | changed
    targets = SparseTargets(torch.zeros(3, 1).long(), torch.ones(3, 1))
    with pytest.raises(ValueError, match=message):
        linear_sparse_kl(torch.zeros(3, 2), targets=targets, labels_N=torch.zeros(3).long(), alpha=0.5, **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(3, 1)), r"ids_NK: got \[3, 1\] torch.float32 on cpu, expected \[N, K\]"),
        ((torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 1)), r"ids_NK: got \[3, 1\] torch.int32"),
        ((torch.zeros(3).long(), torch.zeros(3)), r"ids_NK: got \[3\]"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 1)), r"weights_NK: got \[3, 1\] .*, expected \[3, 2\]"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2).long()), r"weights_NK: got \[3, 2\] torch.int64"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2), torch.zeros(2)), r"tail_N: got \[2\] .*, expected \[3\]"),
    ],
)
def test_targets_that_do_not_fit_together_are_refused(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTargets(*fields)
