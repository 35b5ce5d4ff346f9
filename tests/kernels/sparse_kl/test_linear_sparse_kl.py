"""The fast loss against the dense float64 reference, over everything a caller may hand in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from sparse_kl_cases import PAIRS, Case, assert_within_float32, cases, make, run

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference


@settings(max_examples=400)
@given(cases())
def test_loss_and_gradients_are_those_of_the_reference(case: Case) -> None:
    fast, fast_grads = run(linear_sparse_kl, case)
    true, true_grads = run(reference, case)
    # both in float64: 1e-16 times logits of up to 1000, T^2 and sums of 129 terms
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(fast.loss, true.loss, **close)
    torch.testing.assert_close(fast.kl_N, true.kl_N, **close)
    torch.testing.assert_close(fast.ce_N, true.ce_N, **close)
    for fast_grad, true_grad in zip(fast_grads, true_grads, strict=True):
        # gradients are differences of probabilities times values of up to 200
        torch.testing.assert_close(fast_grad, true_grad, rtol=1e-10, atol=1e-10)
    real = case.settings.get("vocab_size")
    if real is not None:
        assert all((grad[real:] == 0).all() for grad in fast_grads[1:])


@settings(max_examples=150)
@given(cases())
def test_float32_stays_within_rounding_of_float64(case: Case) -> None:
    case = case.to(torch.float32)
    fast, fast_grads = run(linear_sparse_kl, case)
    assert_within_float32(case, fast, fast_grads)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_the_returned_scalar(alpha: float, temperature: float, softcap, pair) -> None:
    kind, divergence, tail = pair
    case = make(
        3,
        kind=kind,
        bias=True,
        weighted=True,
        padding=2,
        repeats=True,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        tail=tail,
        softcap=softcap,
    )
    _, grads = run(linear_sparse_kl, case)
    leaves = [case.hidden_NH, case.weight_VH, case.bias_V]
    generator = torch.Generator().manual_seed(7)
    for index, grad in enumerate(grads):
        direction = torch.randn(grad.shape, generator=generator, dtype=torch.float64)
        ends = []
        for step in (1e-5, -1e-5):
            moved = [leaf + step * direction if number == index else leaf for number, leaf in enumerate(leaves)]
            moved_case = replace(case, hidden_NH=moved[0], weight_VH=moved[1], bias_V=moved[2])
            ends.append(run(linear_sparse_kl, moved_case)[0].loss.item())
        slope = (ends[0] - ends[1]) / 2e-5
        # central differences: step^2 times a third derivative of order 10, and 1e-16 / step
        assert slope == pytest.approx((grad * direction).sum().item(), rel=1e-7, abs=1e-9)


def test_rows_of_weight_zero_change_nothing_whatever_they_hold() -> None:
    case = make(1, num_rows=30, masked="some", weighted=True, bias=True)
    live_N = torch.isfinite(case.hidden_NH).all(-1)
    alone = replace(
        case,
        hidden_NH=case.hidden_NH[live_N],
        targets=SparseTargets(
            case.targets.ids_NK[live_N], case.targets.weights_NK[live_N], case.targets.tail_N[live_N]
        ),
        labels_N=case.labels_N[live_N],
        row_weights_N=case.row_weights_N[live_N],
    )
    assert 0 < live_N.sum() < 30
    masked, masked_grads = run(linear_sparse_kl, case)
    compact, compact_grads = run(linear_sparse_kl, alone)
    # the same products over the same rows: equal bits
    assert torch.equal(masked.loss, compact.loss)
    assert torch.equal(masked_grads[0][live_N], compact_grads[0])
    assert torch.equal(masked_grads[1], compact_grads[1])
    assert (masked_grads[0][~live_N] == 0).all()
    assert (masked.kl_N[~live_N] == 0).all() and (masked.ce_N[~live_N] == 0).all()


@pytest.mark.parametrize("num_rows", [0, 4])
def test_without_a_row_of_weight_loss_and_gradients_are_exactly_zero(num_rows: int) -> None:
    result, grads = run(linear_sparse_kl, make(num_rows=num_rows, masked="all", bias=True).to(torch.float32))
    assert result.loss.item() == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("kind", ["sampled", "topk"])
def test_an_id_may_be_split_and_shuffled(kind: str) -> None:
    case = make(2, kind=kind, temperature=2.0)
    ids_NK, weights_NK = case.targets.ids_NK, case.targets.weights_NK
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    split = torch.cat([weights_NK * 0.5, weights_NK * 0.3, weights_NK * 0.2], 1)[:, order]
    split_targets = SparseTargets(torch.cat([ids_NK] * 3, 1)[:, order], split, case.targets.tail_N)
    whole, whole_grads = run(linear_sparse_kl, case)
    parts, parts_grads = run(linear_sparse_kl, replace(case, targets=split_targets))
    # float64, three summands instead of one
    torch.testing.assert_close(whole.kl_N, parts.kl_N, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(whole_grads, parts_grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_and_blocks_do_not_change_the_result(temperature: float) -> None:
    # 1 MiB holds 512 rows of 512 float32, a block 1024 rows: five chunks against one chunk of three blocks
    case = make(4, num_rows=2500, vocab_size=500, masked="some", bias=True, temperature=temperature).to(torch.float32)
    one, one_grads = run(linear_sparse_kl, case)
    many, many_grads = run(linear_sparse_kl, case, workspace_mb=1)
    true, true_grads = run(reference, case.to(torch.float64))
    for result, grads in ((one, one_grads), (many, many_grads)):
        # each of a row's logprobs is off by a few roundings of float32
        torch.testing.assert_close(result.kl_N, true.kl_N, rtol=1e-5, atol=2e-6, check_dtype=False)
        torch.testing.assert_close(result.loss, true.loss, rtol=1e-6, atol=0, check_dtype=False)
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert (grad - true_grad).norm() <= 1e-6 * true_grad.norm()


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    case = make(5, num_rows=12, width=8, vocab_size=40)
    targets = case.targets
    strided = replace(
        case,
        hidden_NH=case.hidden_NH.t().contiguous().t(),
        weight_VH=torch.stack([case.weight_VH] * 2, -1)[..., 0],
        targets=SparseTargets(
            targets.ids_NK.t().contiguous().t(),
            torch.stack([targets.weights_NK] * 2, -1)[..., 1],
            torch.stack([targets.tail_N] * 3, -1)[..., 1],
        ),
        labels_N=torch.stack([case.labels_N] * 2, -1)[..., 0],
    )
    # `run` would make its leaves contiguous
    leaves = [x.requires_grad_() for x in (strided.hidden_NH, strided.weight_VH)]
    assert not any(leaf.is_contiguous() for leaf in leaves)
    loss = linear_sparse_kl(*leaves, strided.targets, strided.labels_N, **case.settings).loss
    grads = torch.autograd.grad(loss, leaves)
    plain, plain_grads = run(linear_sparse_kl, case)
    # float64; another stride may take another product kernel
    torch.testing.assert_close(loss, plain.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(list(grads), plain_grads, rtol=1e-12, atol=1e-14)


def test_expanded_inputs_give_what_contiguous_ones_give() -> None:
    case = make(5, num_rows=1, width=8, vocab_size=40)
    targets = case.targets
    expanded = (
        case.hidden_NH.expand(9, -1),
        case.weight_VH,
        SparseTargets(targets.ids_NK.expand(9, -1), targets.weights_NK.expand(9, -1), targets.tail_N.expand(9)),
        case.labels_N.expand(9),
    )
    result = linear_sparse_kl(*expanded, row_weights_N=torch.ones(1).expand(9), **case.settings)
    one = linear_sparse_kl(case.hidden_NH, case.weight_VH, targets, case.labels_N, **case.settings)
    # float64; nine rows may take another product kernel than one
    torch.testing.assert_close(result.loss, one.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(result.kl_N, one.kl_N.expand(9), rtol=1e-12, atol=0)


@pytest.mark.parametrize("op", [linear_sparse_kl, reference], ids=["fast", "reference"])
def test_a_tail_below_zero_reads_as_zero(op) -> None:
    case = make(8)
    below, zero = (
        replace(case, targets=SparseTargets(case.targets.ids_NK, case.targets.weights_NK, torch.full((13,), tail)))
        for tail in (-1e-3, 0.0)
    )
    (below_result, below_grads), (zero_result, zero_grads) = run(op, below), run(op, zero)
    assert torch.equal(below_result.kl_N, zero_result.kl_N)
    assert all(torch.equal(a, b) for a, b in zip(below_grads, zero_grads, strict=True))


def test_drawn_targets_pull_on_average_like_the_whole_distribution() -> None:
    case = make(6, num_rows=1, vocab_size=20, alpha=1.0)
    teacher_V = torch.softmax(torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
    ends_V = teacher_V.cumsum(-1)
    num_offsets, num_samples = 2000, 8
    points_On = (torch.arange(num_samples) + (torch.arange(num_offsets)[:, None] + 0.5) / num_offsets) / num_samples
    ids_On = torch.searchsorted(ends_V, points_On.double() * ends_V[-1], right=True)
    drawn = SparseTargets(ids_On, torch.full(ids_On.shape, 1 / num_samples))
    rows = replace(case, hidden_NH=case.hidden_NH.expand(num_offsets, -1), labels_N=case.labels_N.expand(num_offsets))
    mean = run(linear_sparse_kl, replace(rows, targets=drawn))[1][1]
    whole = SparseTargets(torch.arange(20)[None], teacher_V[None])
    full = run(linear_sparse_kl, replace(case, targets=whole))[1][1]
    # a grid of 16000 points holds each probability to 1 / 16000
    assert (mean - full).abs().max() <= 1.01 / 16000 * case.hidden_NH.abs().max()
