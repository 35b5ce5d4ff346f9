"""How the fast loss behaves as a part of a training step: upstream gradients, precision, frozen parts, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.op import loss_and_gradients
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference


class Inside(TorchDispatchMode):
    """Sees the operations inside the op, which to a mode is one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "capgap::linear_sparse_kl":
            with self:
                return loss_and_gradients(*args, **(kwargs or {}))
        return self.see(func, func(*args, **(kwargs or {})))


class Watch(Inside):
    """Counts matrix products and notes the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_products, self.most_elements = 0, 0

    def see(self, func, out):
        self.num_products += func._schema.name in {"aten::mm", "aten::addmm", "aten::addmm_"}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.most_elements = max(self.most_elements, tensor.numel())
        return out


class Poison(Inside):
    """Fills memory that an operation hands out uncleared: with NaN, or with 77 where there is none."""

    def see(self, func, out):
        if func._schema.name in {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"}:
            out.fill_(torch.nan if out.is_floating_point() else 77)
        return out


def _inputs(num_rows: int = 40, width: int = 16, vocab_size: int = 300, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    weight_VH = (torch.randn(vocab_size, width, generator=generator) / 2).to(dtype).requires_grad_()
    weights_NK, ids_NK = torch.softmax(torch.randn(num_rows, vocab_size, generator=generator) * 3, -1).topk(20)
    targets = SparseTargets(ids_NK, weights_NK, 1 - weights_NK.sum(-1))
    return hidden_NH, weight_VH, targets, torch.randint(0, vocab_size, (num_rows,), generator=generator)


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 65536.0])
def test_the_upstream_gradient_multiplies(upstream: float) -> None:
    inputs = _inputs()
    base = torch.autograd.grad(linear_sparse_kl(*inputs, alpha=0.5).loss, inputs[:2])
    scaled = torch.autograd.grad(linear_sparse_kl(*inputs, alpha=0.5).loss * upstream, inputs[:2])
    # one multiplication by a power of two, or by 3 rounded once more
    torch.testing.assert_close(scaled, tuple(grad * upstream for grad in base), rtol=3e-7, atol=0)


def test_two_losses_add_up_in_the_gradient() -> None:
    inputs = _inputs()
    (linear_sparse_kl(*inputs, alpha=0.5).loss + linear_sparse_kl(*inputs, alpha=1.0).loss).backward()
    half, full = (torch.autograd.grad(linear_sparse_kl(*inputs, alpha=a).loss, inputs[1])[0] for a in (0.5, 1.0))
    torch.testing.assert_close(inputs[1].grad, half + full, rtol=1e-6, atol=1e-9)  # one addition in another order


def test_backward_may_run_twice_and_gives_the_same_bits() -> None:
    inputs = _inputs()
    loss = linear_sparse_kl(*inputs, alpha=0.5).loss
    first = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    second = torch.autograd.grad(loss, inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_second_derivative_is_refused() -> None:
    hidden_NH, *rest = _inputs()
    loss = linear_sparse_kl(hidden_NH, *rest, alpha=0.5).loss
    with pytest.raises(RuntimeError, match="got create_graph=True, expected False"):
        torch.autograd.grad(loss, hidden_NH, create_graph=True)


def test_kl_and_ce_are_there_to_be_read_only() -> None:
    result = linear_sparse_kl(*_inputs(), alpha=0.5)
    assert result.loss.requires_grad
    assert not result.kl_N.requires_grad and not result.ce_N.requires_grad


def test_inputs_are_left_alone() -> None:
    inputs = _inputs()
    tensors = [inputs[0], inputs[1], inputs[2].ids_NK, inputs[2].weights_NK, inputs[2].tail_N, inputs[3]]
    before = [tensor.detach().clone() for tensor in tensors]
    linear_sparse_kl(*inputs, alpha=0.5).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


@pytest.mark.parametrize(
    ("frozen", "num_products"), [((), 3), (("hidden",), 2), (("weight",), 2), (("hidden", "weight"), 1)]
)
def test_a_frozen_side_costs_no_product(frozen: tuple[str, ...], num_products: int) -> None:
    hidden_NH, weight_VH, *rest = _inputs()
    both = torch.autograd.grad(linear_sparse_kl(hidden_NH, weight_VH, *rest, alpha=0.5).loss, (hidden_NH, weight_VH))
    hidden_NH.requires_grad_("hidden" not in frozen)
    weight_VH.requires_grad_("weight" not in frozen)
    with Watch() as watch:
        loss = linear_sparse_kl(hidden_NH, weight_VH, *rest, alpha=0.5).loss
    assert watch.num_products == num_products
    for leaf, grad in zip((hidden_NH, weight_VH), both, strict=True):
        if leaf.requires_grad:
            assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], grad)


def test_without_gradients_only_the_logits_are_computed() -> None:
    inputs = _inputs()
    with torch.no_grad(), Watch() as watch:
        result = linear_sparse_kl(*inputs, alpha=0.5)
    assert watch.num_products == 1
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, linear_sparse_kl(*inputs, alpha=0.5).loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("divergence", "tail", "softcap"),
    [
        ("forward_kl", "ghost", None),
        ("forward_kl", "label", 5.0),
        ("reverse_kl", "ghost", None),
        ("jsd", "renorm", 5.0),
    ],
)
def test_uncleared_memory_never_reaches_a_result(divergence, tail, softcap, dtype: torch.dtype) -> None:
    hidden_NH, weight_VH, targets, labels_N = _inputs(num_rows=2000, vocab_size=301, dtype=dtype)
    labels_N[5::7] = -100
    arguments = {"alpha": 0.5, "temperature": 2.0, "vocab_size": 290, "workspace_mb": 1}
    arguments |= {"divergence": divergence, "tail": tail, "softcap": softcap}
    results = []
    for mode in (Poison(), Watch()):
        with mode:
            result = linear_sparse_kl(hidden_NH, weight_VH, targets, labels_N, **arguments)
            results.append([*result, *torch.autograd.grad(result.loss, (hidden_NH, weight_VH))])
    assert all(torch.equal(poisoned, clean) for poisoned, clean in zip(*results, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_tensor_as_large_as_the_logits_is_ever_made(temperature: float) -> None:
    inputs = _inputs(num_rows=4000, width=4, vocab_size=1000)
    with Watch() as watch:
        linear_sparse_kl(*inputs, alpha=0.5, temperature=temperature, workspace_mb=1).loss.backward()
    # the workspace is 2^18 float32; a target is 4000 x 20, the logits would be 4000 x 1000
    assert watch.most_elements <= 2**18


def test_kl_is_left_out_where_it_is_neither_needed_nor_wanted() -> None:
    inputs = _inputs()
    without = linear_sparse_kl(*inputs, alpha=0.0, want_kl=False)
    with_kl = linear_sparse_kl(*inputs, alpha=0.0)
    assert without.kl_N is None and reference(*inputs, alpha=0.0, want_kl=False).kl_N is None
    assert (with_kl.kl_N > 0).all()
    # the same cross-entropy, summed in another order
    torch.testing.assert_close(without.loss, with_kl.loss, rtol=1e-6, atol=0)
    assert linear_sparse_kl(*inputs, alpha=0.5, want_kl=False).kl_N is not None
    plain = torch.nn.functional.cross_entropy(inputs[0] @ inputs[1].t(), inputs[3])
    torch.testing.assert_close(without.loss, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_low_precision_is_as_exact_as_an_unfused_head(dtype: torch.dtype, temperature: float) -> None:
    inputs = _inputs(num_rows=64, vocab_size=500, dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs[:2])
    settings = {"alpha": 0.5, "temperature": temperature}
    true = torch.autograd.grad(reference(*exact, *inputs[2:], **settings).loss, exact)
    plain = torch.autograd.grad(reference(*inputs, **settings).loss, inputs[:2])
    fused = torch.autograd.grad(linear_sparse_kl(*inputs, **settings).loss, inputs[:2])
    for true_grad, plain_grad, fused_grad in zip(true, plain, fused, strict=True):
        assert fused_grad.dtype == dtype
        # both round logits and their gradient once; half as much again for the order of the sums
        assert (fused_grad - true_grad).norm() <= 1.5 * (plain_grad - true_grad).norm()


def test_chunks_of_bfloat16_do_not_drift() -> None:
    inputs = _inputs(num_rows=6000, width=8, vocab_size=1000, dtype=torch.bfloat16)
    exact = inputs[1].detach().double().requires_grad_()
    (true,) = torch.autograd.grad(reference(inputs[0].detach().double(), exact, *inputs[2:], alpha=0.5).loss, exact)
    errors = []
    for workspace_mb in (256, 1):  # one chunk, and twelve
        loss = linear_sparse_kl(*inputs, alpha=0.5, workspace_mb=workspace_mb).loss
        (grad,) = torch.autograd.grad(loss, inputs[1])
        errors.append((grad - true).norm().item())
    # twelve roundings of twelfths add less than one rounding of the whole
    assert errors[1] <= 1.2 * errors[0]


def test_float16_survives_a_loss_scale() -> None:
    inputs = _inputs(num_rows=4, dtype=torch.float16)
    exact = tuple(x.detach().double().requires_grad_() for x in inputs[:2])
    true = torch.autograd.grad(reference(*exact, *inputs[2:], alpha=0.5).loss, exact)
    scaled = torch.autograd.grad(linear_sparse_kl(*inputs, alpha=0.5).loss * 65536.0, inputs[:2])
    for true_grad, grad in zip(true, scaled, strict=True):
        # 65536 itself is no float16; the result is, to float16's 5e-4 and a few roundings on the way
        assert torch.isfinite(grad).all()
        assert (grad.double() / 65536 - true_grad).norm() <= 5e-3 * true_grad.norm()


def test_autocast_computes_the_products_low_and_returns_gradients_of_the_parameters_dtype() -> None:
    inputs = _inputs()
    low = tuple(x.detach().bfloat16().requires_grad_() for x in inputs[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_sparse_kl(*inputs, alpha=0.5).loss
        grads = torch.autograd.grad(loss, inputs[:2])
    low_loss = linear_sparse_kl(*low, *inputs[2:], alpha=0.5).loss
    low_grads = torch.autograd.grad(low_loss, low)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, low_loss)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    # hidden states come in the autocast dtype from a layer, and take their gradient in it
    assert torch.equal(grads[0], low_grads[0].float())
    # the parameter's is that sum over chunks before it is rounded
    assert torch.equal(grads[1].bfloat16(), low_grads[1])
    rounded = (grads[1] == low_grads[1].float()).float().mean()
    assert rounded < 0.5, "a float32 weight's gradient holds bfloat16 numbers"


def test_under_autocast_a_float32_weight_and_bias_take_gradients_nearer_the_truth_than_rounded_ones() -> None:
    hidden_NH, weight_VH, *rest = _inputs(num_rows=3000, vocab_size=300)
    bias_V = torch.linspace(-1, 1, 300).requires_grad_()
    exact = [x.detach().bfloat16().double().requires_grad_() for x in (hidden_NH, weight_VH, bias_V)]
    true = torch.autograd.grad(reference(*exact[:2], *rest, alpha=0.5, bias_V=exact[2]).loss, exact[1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_sparse_kl(hidden_NH, weight_VH, *rest, alpha=0.5, bias_V=bias_V, workspace_mb=1).loss
    found = torch.autograd.grad(loss, (weight_VH, bias_V))
    for grad, true_grad in zip(found, true, strict=True):
        assert grad.dtype == torch.float32
        # logits and their gradient are rounded once each, and on a CPU each chunk's product: all of it averages out
        assert (grad - true_grad).norm() <= (grad.bfloat16() - true_grad).norm()


def test_a_repeated_call_gives_the_same_bits() -> None:
    inputs = _inputs(num_rows=700, vocab_size=900)
    first, second = (
        torch.autograd.grad(linear_sparse_kl(*inputs, alpha=0.5, workspace_mb=1).loss, inputs[:2]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
