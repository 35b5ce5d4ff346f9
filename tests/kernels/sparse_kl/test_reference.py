"""The dense reference against the definition, written out term by term in Python."""

from __future__ import annotations

import math

import pytest
import torch

from capgap.kernels.sparse_kl import SparseTargets
from capgap.kernels.sparse_kl.reference import linear_sparse_kl


def _row(logits: list[float], target: dict[int, float], tail: float | None, label: int, temperature: float):
    """KL and cross-entropy of one row by the definition."""
    tempered = [math.exp(z / temperature) for z in logits]
    q = [x / sum(tempered) for x in tempered]
    kl = sum(p * math.log(p / q[i]) for i, p in target.items())
    others = [q[i] for i in range(len(q)) if i not in target]
    if tail and others:
        kl += tail * math.log(tail / sum(others))
    plain = [math.exp(z) for z in logits]
    return kl, -math.log(plain[label] / sum(plain))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_tail", [False, True])
def test_the_loss_is_the_definition_term_by_term(with_tail: bool, temperature: float) -> None:
    logits_NV = torch.tensor(
        [[0.3, -1.0, 2.0, 0.5, 9.0], [1.0, 0.0, -2.0, 0.1, 9.0], [5.0, 5.0, 5.0, 5.0, 9.0]],
        dtype=torch.float64,
    )
    # row 0 repeats id 2, holds padding and an id of a padded column; row 2 is masked
    targets = SparseTargets(
        torch.tensor([[2, 0, 2, 1, 4], [3, 1, -1, 0, 0], [0, 1, 2, 3, 3]]),
        torch.tensor(
            [[0.3, 0.2, 0.1, 0.0, 0.9], [0.5, 0.2, 0.3, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.0]], dtype=torch.float64
        ),
        torch.tensor([0.4, 0.3, 0.2], dtype=torch.float64) if with_tail else None,
    )
    weights = [2.0, 0.5]
    first = _row(logits_NV[0, :4].tolist(), {2: 0.4, 0: 0.2}, 0.4 if with_tail else None, 3, temperature)
    second = _row(logits_NV[1, :4].tolist(), {3: 0.5, 1: 0.2}, 0.3 if with_tail else None, 1, temperature)
    expected = sum(
        w * (0.3 * temperature**2 * kl + 0.7 * ce) for w, (kl, ce) in zip(weights, (first, second), strict=True)
    ) / sum(weights)
    result = linear_sparse_kl(
        logits_NV,
        torch.eye(5).double(),
        targets,
        torch.tensor([3, 1, -100]),
        alpha=0.3,
        temperature=temperature,
        row_weights_N=torch.tensor([2.0, 0.5, 1.0]).double(),
        vocab_size=4,
    )
    # float64, a dozen terms of order 1
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    assert result.kl_N.tolist() == pytest.approx([first[0], second[0], 0.0], rel=1e-12)
    assert result.ce_N.tolist() == pytest.approx([first[1], second[1], 0.0], rel=1e-12)


def test_where_every_id_is_kept_the_tail_is_ignored() -> None:
    ids_NK, weights_NK = torch.tensor([[0, 1, 2]]), torch.tensor([[0.2, 0.3, 0.4]])
    arguments = (torch.tensor([[1.0, 2.0, 3.0]]).double(), torch.eye(3).double())
    with_tail = linear_sparse_kl(
        *arguments, SparseTargets(ids_NK, weights_NK, torch.tensor([0.1])), torch.tensor([0]), alpha=1.0
    )
    without = linear_sparse_kl(*arguments, SparseTargets(ids_NK, weights_NK), torch.tensor([0]), alpha=1.0)
    assert with_tail.loss.item() == without.loss.item() != 0


def test_a_tail_only_groups_ids_so_the_kl_is_a_lower_bound_of_the_full_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    teacher_NV = torch.softmax(torch.randn(20, 30, generator=generator, dtype=torch.float64), -1)
    full_N = (teacher_NV * (teacher_NV.log() - torch.log_softmax(logits_NV, -1))).sum(-1)
    before_N = torch.zeros(20, dtype=torch.float64)
    for top_k in (1, 5, 15, 30):
        weights_NK, ids_NK = teacher_NV.topk(top_k)
        targets = SparseTargets(ids_NK, weights_NK, 1 - weights_NK.sum(-1))
        kl_N = linear_sparse_kl(logits_NV, torch.eye(30).double(), targets, torch.zeros(20).long(), alpha=1.0).kl_N
        # more kept ids, a finer grouping; float64 rounding
        assert (kl_N >= before_N - 1e-12).all() and (kl_N <= full_N + 1e-12).all()
        before_N = kl_N
    torch.testing.assert_close(before_N, full_N, rtol=1e-12, atol=1e-13)
