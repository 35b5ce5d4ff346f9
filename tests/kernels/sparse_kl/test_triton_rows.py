"""The rows kernel in Triton against float64, on a GPU; test_triton_interpreted.py runs the same on a CPU."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from sparse_kl_cases import PAIRS, Case, assert_within_float32, cases, make, run
from torch import Tensor

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.backends import kernel_for
from capgap.kernels.sparse_kl.chunks import pitch
from capgap.kernels.sparse_kl.prepare import prepare
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference
from capgap.kernels.sparse_kl.rows import Rows, RowSettings
from capgap.kernels.sparse_kl.torch_rows import torch_rows

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no GPU can be used; test_triton_interpreted.py runs these tests in Triton's interpreter",
    ),
]
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="takes a GPU")

# For 16 bits: half a unit in the last place, where rounding is to nearest. Triton's interpreter cuts the last bits of a
# bfloat16 off instead: a whole one. Of float32: exp of -20, whose argument a GPU rounds to 1e-6.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
# A gradient is a difference of two probabilities, each off by a few float32 roundings of 6e-8.
ABSOLUTE = 1e-6


def random_rows(
    num_rows: int, vocab_size: int, top_k: int, dtype: torch.dtype, *, scale: float = 4.0, device=DEVICE
) -> tuple[Tensor, Rows]:
    """Logits whose padding is NaN, and rows of every sort: repeats, holes, empty, label kept and not."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_NP = torch.full((num_rows, pitch(vocab_size)), torch.nan)
    logits_NP[:, :vocab_size] = torch.randn(num_rows, vocab_size, generator=generator) * scale
    ids_NK = torch.randint(-1, vocab_size + 1, (num_rows, top_k), generator=generator)
    p_NK = torch.rand(num_rows, top_k, generator=generator) / top_k
    p_NK[1:2] = 0
    labels_N = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    if top_k:
        labels_N[0] = ids_NK[0, 0].clamp(0, vocab_size - 1)
    kept = prepare(ids_NK, p_NK, torch.full((num_rows,), 0.25), labels_N, "ghost", vocab_size)
    factors = torch.rand(2, num_rows, generator=generator)
    rows = Rows(*kept, labels_N, *factors)
    return logits_NP.to(dtype).to(device), Rows(*(field.to(device) for field in rows))


def truth(logits_NP: Tensor, rows: Rows, settings: RowSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence, cross-entropy and gradient by the kernel in torch, in float64."""
    logits_NP = logits_NP.double()
    rows = Rows(*(field.double() if field.is_floating_point() else field for field in rows))
    kl_N, ce_N = torch_rows(logits_NP, rows, settings, want_gradient=True)
    return kl_N, ce_N, logits_NP[:, : settings.vocab_size]


def compute(logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool = True) -> tuple[Tensor, Tensor]:
    return kernel_for("triton", logits_NP.device, logits_NP.dtype)(logits_NP, rows, settings, want_gradient)


def assert_agrees(logits_NP: Tensor, rows: Rows, settings: RowSettings) -> None:
    kl_N, ce_N, d_logits_NV = truth(logits_NP, rows, settings)
    found_NP = logits_NP.clone()
    found = compute(found_NP, rows, settings)
    # float32 logprobs of logits of about 10
    torch.testing.assert_close(found[0].double(), kl_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), ce_N, rtol=1e-5, atol=1e-5)
    close = {"rtol": ROUNDING[logits_NP.dtype], "atol": ABSOLUTE}
    torch.testing.assert_close(found_NP[:, : settings.vocab_size].double(), d_logits_NV, **close)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients_are_those_of_the_reference(temperature: float, softcap, pair) -> None:
    kind, divergence, tail = pair
    case = make(
        1,
        num_rows=6,
        vocab_size=33,
        padding=3,
        kind=kind,
        scale=4.0,
        masked="some",
        holes=True,
        repeats=True,
        bias=True,
        weighted=True,
        divergence=divergence,
        tail=tail,
        temperature=temperature,
        softcap=softcap,
    ).on(DEVICE)
    found, found_grads = run(linear_sparse_kl, case.to(torch.float32), backend="triton")
    true, true_grads = run(reference, case)
    assert found.loss.dtype == torch.float32
    # float32 logits of about 4, over sums of 33 terms
    for a, b in zip(
        [found.loss, found.kl_N, found.ce_N, *found_grads], [true.loss, true.kl_N, true.ce_N, *true_grads], strict=True
    ):
        assert (a - b).norm() <= 3e-6 * b.norm()
        assert b.norm() > 0
    assert all((grad[33:] == 0).all() for grad in found_grads[1:])


# on a GPU nearly each of them is a program to be compiled first
@settings(max_examples=60 if INTERPRETED else 15, derandomize=True, database=None)
@given(cases())
def test_any_case_stays_within_rounding_of_float64(case: Case) -> None:
    case = case.to(torch.float32).on(DEVICE)
    assert_within_float32(case, *run(linear_sparse_kl, case, backend="triton"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_gradient_is_rounded_once(temperature: float, divergence, dtype: torch.dtype) -> None:
    assert_agrees(*random_rows(4, 101, 7, dtype), RowSettings(101, temperature, divergence, 0.3, None))


@pytest.mark.parametrize(("vocab_size", "top_k"), [(1, 1), (2, 1), (15, 15), (16, 1), (33, 128), (129, 64), (8, 0)])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_any_number_of_ids_is_kept(divergence, vocab_size: int, top_k: int) -> None:
    assert_agrees(
        *random_rows(3, vocab_size, top_k, torch.float32), RowSettings(vocab_size, 2.0, divergence, 0.5, None)
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_where_every_id_is_kept_there_is_no_tail(temperature: float, divergence) -> None:
    logits_NP, rows = random_rows(3, 21, 21, torch.float32)
    every_id_NK = torch.arange(21, dtype=torch.int32, device=DEVICE).expand(3, -1).contiguous()
    rows = rows._replace(ids_NK=every_id_NK, p_NK=torch.full((3, 21), 1 / 30, device=DEVICE))
    assert_agrees(logits_NP, rows, RowSettings(21, temperature, divergence, 0.5, None))


# a block is 1024 columns of float32
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (2.0, None), (1.0, 30.0)])
@pytest.mark.parametrize("vocab_size", [2048, 4099])
def test_a_row_of_several_blocks_is_one_row(vocab_size: int, temperature: float, softcap) -> None:
    assert_agrees(
        *random_rows(2, vocab_size, 20, torch.float32), RowSettings(vocab_size, temperature, "forward_kl", 0.5, softcap)
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_logits_of_200_neither_overflow_nor_lose_the_gradient(temperature: float, divergence) -> None:
    logits_NP, rows = random_rows(4, 65, 5, torch.float32)
    logits_NP = logits_NP.clamp(-8, 8) * 25
    settings = RowSettings(65, temperature, divergence, 0.5, None)
    kl_N, ce_N, d_logits_NV = truth(logits_NP, rows, settings)
    found = compute(logits_NP, rows, settings)
    # a logprob of a few hundred is off by roundings of 2e-5, and over T
    close = {"rtol": 1e-5, "atol": 1e-4 / min(1.0, temperature)}
    torch.testing.assert_close(found[0].double(), kl_N, **close)
    torch.testing.assert_close(found[1].double(), ce_N, **close)
    torch.testing.assert_close(logits_NP[:, :65].double(), d_logits_NV, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize("probability", [0.9, 0.99, 0.999, 0.99999])
def test_a_confident_label_keeps_its_gradient(probability: float, is_kept: bool, dtype: torch.dtype) -> None:
    logits_NP = torch.zeros(1, 64, dtype=dtype, device=DEVICE)
    logits_NP[0, 3] = math.log(49 * probability / (1 - probability))
    ids_NK = torch.tensor([[3 if is_kept else 5]], dtype=torch.int32, device=DEVICE)
    one_N, half_N = torch.ones(1, device=DEVICE), torch.full((1,), 0.5, device=DEVICE)
    rows = Rows(ids_NK, half_N[:, None], half_N, torch.tensor([3], device=DEVICE), 0 * one_N, one_N)
    settings = RowSettings(50, 1.0, "forward_kl", 0.5, None)
    d_label = truth(logits_NP, rows, settings)[2][0, 3]
    compute(logits_NP, rows, settings)
    # no difference from 1 is taken: what is lost is a rounding of each sum and exp, and of the gradient itself
    assert logits_NP[0, 3].item() == pytest.approx(d_label.item(), rel=ROUNDING[dtype])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_past_the_vocabulary_nothing_is_read_and_exact_zeros_are_written(temperature: float, softcap) -> None:
    logits_NP, rows = random_rows(3, 37, 5, torch.float32)
    settings = RowSettings(37, temperature, "jsd", 0.5, softcap)
    other_NP = logits_NP.clone()
    other_NP[:, 37:] = 1e30
    first, second = (compute(chunk_NP, rows, settings) for chunk_NP in (logits_NP, other_NP))
    assert logits_NP.isfinite().all() and (logits_NP[:, 37:] == 0).all()
    assert torch.equal(logits_NP, other_NP)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_repeated_call_gives_the_same_bits_with_and_without_a_gradient() -> None:
    logits_NP, rows = random_rows(4, 5003, 16, torch.float16)
    settings = RowSettings(5003, 2.0, "jsd", 0.5, None)
    chunks = [logits_NP.clone() for _ in range(3)]
    results = [compute(chunk, rows, settings, want) for chunk, want in zip(chunks, (True, True, False), strict=True)]
    assert torch.equal(chunks[0], chunks[1])
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


def test_a_part_of_a_buffer_and_strided_rows_are_read_where_they_are() -> None:
    logits_NP, rows = random_rows(6, 50, 5, torch.float32)
    settings = RowSettings(50, 1.0, "forward_kl", 0.5, None)
    expected_NP = logits_NP.clone()
    expected = compute(expected_NP, rows, settings)
    strided = Rows(*(torch.stack([field, torch.zeros_like(field)], -1)[..., 0] for field in rows))
    assert not any(field.is_contiguous() for field in strided)
    part = slice(2, 5)
    found = compute(logits_NP[part], strided.part(part), settings)
    assert torch.equal(logits_NP[part, :50], expected_NP[part, :50])
    assert all(torch.equal(a, b[part]) for a, b in zip(found, expected, strict=True))


def test_rows_more_than_2_to_the_31_elements_apart_are_found() -> None:
    few_NP, rows = random_rows(3, 21, 5, torch.float16)
    settings = RowSettings(21, 1.0, "forward_kl", 0.5, None)
    # 4 GiB of addresses, of which three rows are ever touched
    memory = torch.empty(2**31 + 32, dtype=torch.float16, device=DEVICE)
    far_NP = memory.as_strided((3, 32), (2**30, 1))
    far_NP.copy_(few_NP)
    expected = compute(few_NP, rows, settings)
    found = compute(far_NP, rows, settings)
    assert torch.equal(far_NP, few_NP)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_row_with_nan_in_it_has_a_loss_of_nan_and_leaves_the_others() -> None:
    logits_NP, rows = random_rows(3, 33, 4, torch.float32)
    logits_NP[1, 7] = torch.nan
    kl_N, ce_N = compute(logits_NP, rows, RowSettings(33, 1.0, "forward_kl", 0.5, None))
    assert ce_N.isnan().tolist() == [False, True, False]
    assert logits_NP[::2, :33].isfinite().all() and kl_N[::2].isfinite().all()


def test_chunks_do_not_change_the_result() -> None:
    case = make(4, num_rows=9, vocab_size=70_000, masked="some").to(torch.float32).on(DEVICE)
    results = [run(linear_sparse_kl, case, workspace_mb=size, backend="triton") for size in (1, 16)]
    (many, many_grads), (one, one_grads) = results
    # three rows of 70,000 float32 are 1 MiB; another number of rows may take another product kernel
    torch.testing.assert_close(many.loss, one.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(many_grads, one_grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=on_a_gpu)])
def test_it_runs_inside_torch_compile(compiler: str) -> None:
    case = make(2, num_rows=4, temperature=2.0).to(torch.float32).on(DEVICE)

    def loss(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return linear_sparse_kl(
            hidden_NH, weight_VH, case.targets, case.labels_N, backend="triton", **case.settings
        ).loss

    results = []
    for function in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
        leaves = [x.detach().clone().requires_grad_() for x in (case.hidden_NH, case.weight_VH)]
        value = function(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_logprobs_of_minus_infinity_are_padding() -> None:
    case = make(7, num_rows=4).to(torch.float32).on(DEVICE)
    logprobs_NK = case.targets.weights_NK.log()
    logprobs_NK[:, -1] = -torch.inf
    padded = SparseTargets.topk(case.targets.ids_NK, logprobs_NK, case.targets.tail_N)
    short = SparseTargets.topk(case.targets.ids_NK[:, :-1], logprobs_NK[:, :-1], case.targets.tail_N)
    results = [run(linear_sparse_kl, replace(case, targets=targets), backend="triton") for targets in (padded, short)]
    (padded_result, padded_grads), (short_result, short_grads) = results
    # float32 sums of K and K - 1 terms
    torch.testing.assert_close(padded_result.kl_N, short_result.kl_N, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(padded_grads, short_grads, rtol=1e-5, atol=1e-6)
