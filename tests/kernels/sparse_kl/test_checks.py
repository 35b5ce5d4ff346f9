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
        ({"beta": 0.0}, "beta: got 0.0, expected a number between 0 and 1"),
        ({"beta": 1.0}, "beta: got 1.0"),
        ({"softcap": 0.0}, "softcap: got 0.0, expected a finite number above 0, or None"),
        ({"tail": "ghost"}, "tail: got 'ghost' with targets.tail_N None, expected targets with their tail"),
        ({"tail": "label"}, "tail: got 'label' with targets.tail_N None"),
        ({"divergence": "hellinger"}, "recording, divergence: got 'topk', 'hellinger', expected topk or sampled, and"),
        ({"tail": "other"}, "tail: got 'other' with forward_kl on topk targets, expected drop or renorm or ghost or"),
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
    ("recording", "divergence", "tail", "message"),
    [
        ("sampled", "reverse_kl", "ghost", "got reverse_kl on sampled targets, .* unbiased .* is linear in them"),
        ("sampled", "jsd", "renorm", "got jsd on sampled targets, expected forward_kl; .* is linear in them"),
        ("sampled", "forward_kl", "ghost", "got 'ghost' with forward_kl on sampled .*; samples have no tail"),
        ("sampled", "forward_kl", "label", "got 'label' with forward_kl on sampled .*; samples have no tail"),
        ("topk", "reverse_kl", "drop", "got 'drop' with reverse_kl on topk .*, expected ghost; otherwise the teacher"),
        ("topk", "reverse_kl", "renorm", "got 'renorm' .* the KL is unbounded"),
        ("topk", "reverse_kl", "label", "got 'label' .* the KL is unbounded"),
        ("topk", "jsd", "drop", "got 'drop' .*, expected renorm or ghost or label; .* is no distribution"),
    ],
)
@pytest.mark.parametrize("op", [linear_sparse_kl, reference], ids=["fast", "reference"])
def test_a_divergence_without_meaning_on_the_targets_is_refused_with_why(
    op, recording, divergence, tail, message
) -> None:
    tail_N = None if recording == "sampled" else torch.zeros(3)
    targets = SparseTargets(torch.zeros(3, 1).long(), torch.ones(3, 1), tail_N, recording)
    settings = {"alpha": 0.5, "divergence": divergence, "tail": tail}
    with pytest.raises(ValueError, match=message):
        op(torch.zeros(3, 2), torch.zeros(5, 2), targets, torch.zeros(3).long(), **settings)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -0.1])
def test_a_target_that_is_no_probability_is_refused_with_its_row_where_the_row_counts(bad: float) -> None:
    weights_NK, labels_N = torch.full((4, 2), 0.5), torch.tensor([0, -100, 1, 2])
    weights_NK[2, 1] = bad
    targets = SparseTargets(torch.tensor([[0, 1]]).repeat(4, 1), weights_NK)
    arguments = (torch.ones(4, 2), torch.ones(5, 2), targets)
    with pytest.raises(ValueError, match=r"targets: got \[0.5, .*\] in row 2, expected finite probabilities"):
        linear_sparse_kl(*arguments, labels_N, alpha=0.5)
    labels_N[2] = -100
    assert torch.isfinite(linear_sparse_kl(*arguments, labels_N, alpha=0.5).loss)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_tail_that_is_no_number_is_refused_with_its_row(bad: float) -> None:
    targets = SparseTargets(torch.tensor([[0, 1]]), torch.full((1, 2), 0.4), torch.tensor([bad]))
    with pytest.raises(ValueError, match=f"and the tail {bad} in row 0, expected finite probabilities"):
        linear_sparse_kl(torch.ones(1, 2), torch.ones(5, 2), targets, torch.zeros(1).long(), alpha=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((torch.zeros(3, 1), torch.zeros(3, 1)), r"ids_NK: got \[3, 1\] torch.float32 on cpu, expected \[N, K\]"),
        ((torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 1)), r"ids_NK: got \[3, 1\] torch.int32"),
        ((torch.zeros(3).long(), torch.zeros(3)), r"ids_NK: got \[3\]"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 1)), r"weights_NK: got \[3, 1\] .*, expected \[3, 2\]"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2).long()), r"weights_NK: got \[3, 2\] torch.int64"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2), torch.zeros(2)), r"tail_N: got \[2\] .*, expected \[3\]"),
        ((torch.zeros(3, 2).long(), torch.zeros(3, 2), torch.zeros(3), "sampled"), "tail_N: got a tensor with sampled"),
    ],
)
def test_targets_that_do_not_fit_together_are_refused(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseTargets(*fields)
