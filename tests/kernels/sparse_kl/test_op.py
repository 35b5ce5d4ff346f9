"""The registered op: what torch.compile, autocast, checkpointing and sharding do with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl, op

PAIRS = [("forward_kl", "ghost"), ("forward_kl", "label"), ("reverse_kl", "ghost"), ("jsd", "renorm")]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def _targets(num_rows: int = 12, vocab_size: int = 60) -> tuple[SparseTargets, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights_NK, ids_NK = torch.softmax(torch.randn(num_rows, vocab_size, generator=generator) * 3, -1).topk(7)
    labels_N = torch.randint(0, 57, (num_rows,), generator=generator)
    labels_N[3] = -100
    return SparseTargets(ids_NK, weights_NK, 1 - weights_NK.sum(-1)), labels_N


class Student(nn.Module):
    """A body and a head, whose forward returns the loss."""

    def __init__(self, bias: bool = True, **settings) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 60, bias=bias)
        self.settings = {"alpha": 0.5, "vocab_size": 57} | settings

    def forward(self, input_NI: Tensor, targets: SparseTargets, labels_N: Tensor) -> Tensor:
        hidden_NH = torch.tanh(self.body(input_NI))
        weight_VH, bias_V = self.head.weight, self.head.bias
        return linear_sparse_kl(hidden_NH, weight_VH, targets, labels_N, bias_V=bias_V, **self.settings).loss


def _input() -> Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


def _grads(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False), (True, False, False)])
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_the_registrations_agree_with_the_op(divergence: str, tail: str, needs: tuple[bool, ...]) -> None:
    targets, labels_N = _targets()
    hidden_NH, weight_VH, bias_V = torch.randn(12, 16), torch.randn(60, 16), torch.randn(60)
    for tensor, needed in zip((hidden_NH, weight_VH, bias_V), needs, strict=True):
        tensor.requires_grad_(needed)
    rows = (targets.ids_NK, targets.weights_NK, targets.tail_N, labels_N, None)
    settings = ([0.5, 2.0, 0.5, 0.0], divergence, tail, 57, 2**20, "auto", False, -1, list(needs))
    torch.library.opcheck(op._op, (hidden_NH, weight_VH, bias_V, *rows, *settings))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
def test_a_compiled_student_learns_as_an_eager_one(divergence: str, tail: str, temperature: float, bias: bool) -> None:
    arguments = {"divergence": divergence, "tail": tail, "temperature": temperature, "bias": bias}
    targets, labels_N = _targets()
    eager, student = Student(**arguments), Student(**arguments)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    losses = [module(_input(), targets, labels_N) for module in (eager, compiled)]
    for loss in losses:
        (loss * 0.25).backward()
    # the same operations on the same numbers: equal bits
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(_grads(eager), _grads(student), strict=True))
    assert len(_grads(student)) == (4 if bias else 3)


def test_a_compiled_autocast_student_learns_as_an_eager_one() -> None:
    targets, labels_N = _targets()
    eager, student = Student(), Student()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [module(_input(), targets, labels_N) for module in (eager, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(_grads(eager), _grads(student), strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    targets, labels_N = _targets()
    plain, checkpointed = Student(), Student()
    plain(_input(), targets, labels_N).backward()
    loss = checkpoint(checkpointed, _input().requires_grad_(), targets, labels_N, use_reentrant=reentrant)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(_grads(plain), _grads(checkpointed), strict=True))


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    targets, labels_N = _targets()
    labels_N[3] = 3  # every row counts, so the mean over the batch is the mean of the halves' means
    whole, halves = Student(), Student()
    whole(_input(), targets, labels_N).backward()
    for part in (slice(0, 6), slice(6, 12)):
        some = SparseTargets(targets.ids_NK[part], targets.weights_NK[part], targets.tail_N[part])
        (halves(_input()[part], some, labels_N[part]) / 2).backward()
    for a, b in zip(_grads(whole), _grads(halves), strict=True):
        # float32 sums of twelve rows in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", ["body", "head"])
def test_a_frozen_part_of_a_compiled_student_gets_no_gradient(frozen: str) -> None:
    targets, labels_N = _targets()
    eager, student = Student(), Student()
    eager(_input(), targets, labels_N).backward()
    student.get_submodule(frozen).requires_grad_(False)
    torch.compile(student, backend="aot_eager", fullgraph=True)(_input(), targets, labels_N).backward()
    for (name, parameter), other in zip(student.named_parameters(), eager.parameters(), strict=True):
        assert parameter.grad is None if name.startswith(frozen) else torch.equal(parameter.grad, other.grad)


def test_batches_of_other_sizes_run_in_one_compiled_student() -> None:
    targets, labels_N = _targets()
    eager, student = Student(), Student()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for num_rows in (12, 7, 5, 9):
        rows = slice(0, num_rows)
        some = SparseTargets(targets.ids_NK[rows], targets.weights_NK[rows], targets.tail_N[rows])
        for module in (eager, compiled):
            module(_input()[rows], some, labels_N[rows]).backward()
    assert all(torch.equal(a, b) for a, b in zip(_grads(eager), _grads(student), strict=True))


def test_a_compiled_plain_cross_entropy_is_the_eager_one() -> None:
    targets, labels_N = _targets()
    eager, student = (Student(alpha=0.0, want_kl=False) for _ in range(2))
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for module in (eager, compiled):
        module(_input(), targets, labels_N).backward()
    assert all(torch.equal(a, b) for a, b in zip(_grads(eager), _grads(student), strict=True))
    logits_NV = eager.head(torch.tanh(eager.body(_input())))[:, :57]
    expected = nn.functional.cross_entropy(logits_NV, labels_N)
    # float32, eleven rows in another order
    torch.testing.assert_close(eager(_input(), targets, labels_N), expected, rtol=1e-6, atol=0)


def test_a_second_derivative_of_a_compiled_loss_is_refused() -> None:
    targets, labels_N = _targets()
    student = Student()
    loss = torch.compile(student, backend="aot_eager", fullgraph=True)(_input(), targets, labels_N)
    with pytest.raises(RuntimeError):
        grads = torch.autograd.grad(loss, list(student.parameters()), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()


def test_a_call_for_no_gradient_inside_a_compiled_graph_gives_the_same_loss() -> None:
    targets, labels_N = _targets()
    student = Student()
    with torch.no_grad():
        compiled = torch.compile(student, backend="aot_eager", fullgraph=True)(_input(), targets, labels_N)
        assert torch.equal(compiled, student(_input(), targets, labels_N))
