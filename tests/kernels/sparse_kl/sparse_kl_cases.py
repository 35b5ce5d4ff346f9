"""Cases that several tests of the loss share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from capgap.kernels.sparse_kl import SparseKl, SparseTargets
from capgap.kernels.sparse_kl.reference import linear_sparse_kl as reference


@dataclass
class Case:
    hidden_NH: Tensor
    weight_VH: Tensor
    targets: SparseTargets
    labels_N: Tensor
    settings: dict
    row_weights_N: Tensor | None = None
    bias_V: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Case:
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return replace(self, hidden_NH=self.hidden_NH.to(dtype), weight_VH=self.weight_VH.to(dtype), bias_V=bias_V)

    def on(self, device: torch.device) -> Case:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        targets = self.targets
        tail_N = None if targets.tail_N is None else targets.tail_N.to(device)
        moved_targets = replace(
            targets, ids_NK=targets.ids_NK.to(device), weights_NK=targets.weights_NK.to(device), tail_N=tail_N
        )
        return replace(self, targets=moved_targets, **moved)


def run(op, case: Case, **changed) -> tuple[SparseKl, list[Tensor]]:
    """Result, and gradients of hidden, weight and, if there is one, bias."""
    leaves = [x.detach().clone() for x in (case.hidden_NH, case.weight_VH, case.bias_V) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    more = {"bias_V": leaves[2]} if case.bias_V is not None else {}
    arguments = case.settings | {"row_weights_N": case.row_weights_N} | more | changed
    result = op(*leaves[:2], case.targets, case.labels_N, **arguments)
    result.loss.backward()
    return result, [leaf.grad for leaf in leaves]


def make(
    seed: int = 0,
    *,
    num_rows: int = 13,
    width: int = 6,
    vocab_size: int = 33,
    padding: int = 0,
    top_k: int = 5,
    kind: str = "topk",
    scale: float = 1.0,
    masked: str = "none",
    holes: bool = False,
    repeats: bool = False,
    bias: bool = False,
    weighted: bool = False,
    **settings,
) -> Case:
    """A case in float64. `scale` is about the largest logit; masked rows hold NaN wherever a float stands."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_NH, weight_VH = normal(num_rows, width), normal(vocab_size + padding, width) * scale / width
    labels_N = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    teacher_NV = torch.softmax(normal(num_rows, vocab_size) * 3, -1)
    weights_NK, ids_NK = teacher_NV.topk(min(top_k, vocab_size))
    if repeats:
        ids_NK = ids_NK[:, torch.randint(0, ids_NK.shape[1], (ids_NK.shape[1],), generator=generator)]
    if num_rows:
        labels_N[0] = ids_NK[0, 0]
    tail_N: Tensor | None = 1 - weights_NK.sum(-1)
    if kind == "sampled":
        weights_NK, tail_N = weights_NK / weights_NK.sum(-1, keepdim=True), None
    if holes and num_rows:
        ids_NK, weights_NK = ids_NK.clone(), weights_NK.clone()
        outside = torch.tensor([-1, vocab_size, vocab_size + padding, 2**31 - 1, 2**40, -(2**40)])
        ids_NK[::2, -1] = outside[torch.randint(0, 6, (len(ids_NK[::2]),), generator=generator)]
        weights_NK[::3, 0] = 0
        ids_NK[num_rows // 2] = -1
    row_weights_N = torch.rand(num_rows, generator=generator, dtype=torch.float64) if weighted else None
    dead_N = {"none": torch.zeros(num_rows), "some": torch.arange(num_rows) % 3 == 1, "all": torch.ones(num_rows)}[
        masked
    ]
    dead_N = dead_N.bool()
    labels_N[dead_N] = -100
    if row_weights_N is not None:  # half of the masked rows by weight, with labels that would count
        labels_N[dead_N & (torch.arange(num_rows) % 2 == 0)] = 0
        row_weights_N[dead_N] = 0
    hidden_NH[dead_N], weights_NK = torch.nan, weights_NK.masked_fill(dead_N[:, None], torch.nan)
    tail_N = None if tail_N is None else tail_N.masked_fill(dead_N, torch.nan)
    if padding:
        settings["vocab_size"] = vocab_size
    return Case(
        hidden_NH,
        weight_VH,
        SparseTargets(ids_NK, weights_NK, tail_N),
        labels_N,
        {"alpha": 0.5} | settings,
        row_weights_N,
        normal(vocab_size + padding) if bias else None,
    )


# Every recording, divergence and tail that fit together.
PAIRS = [
    ("sampled", "forward_kl", "drop"),
    ("sampled", "forward_kl", "renorm"),
    ("topk", "forward_kl", "drop"),
    ("topk", "forward_kl", "renorm"),
    ("topk", "forward_kl", "ghost"),
    ("topk", "forward_kl", "label"),
    ("topk", "reverse_kl", "ghost"),
    ("topk", "jsd", "renorm"),
    ("topk", "jsd", "ghost"),
    ("topk", "jsd", "label"),
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab_size = draw(st.sampled_from([1, 2, 15, 16, 33, 129]))
    kind, divergence, tail = draw(st.sampled_from(PAIRS))
    return make(
        draw(st.integers(0, 2**20)),
        num_rows=draw(st.sampled_from([0, 1, 2, 13])),
        width=draw(st.sampled_from([1, 6])),
        vocab_size=vocab_size,
        padding=draw(st.sampled_from([0, 1, 20])),
        top_k=draw(st.sampled_from([1, 5, vocab_size])),
        kind=kind,
        scale=draw(st.sampled_from([1.0, 8.0, 200.0])),
        masked=draw(st.sampled_from(["none", "some", "all"])),
        holes=draw(st.booleans()),
        repeats=draw(st.booleans()),
        bias=draw(st.booleans()),
        weighted=draw(st.booleans()),
        alpha=draw(st.sampled_from([0.0, 0.5, 1.0])),
        temperature=draw(st.sampled_from([1.0, 2.0, 0.7])),
        divergence=divergence,
        tail=tail,
        beta=draw(st.sampled_from([0.1, 0.5, 0.9])),
        softcap=draw(st.sampled_from([None, 30.0, 2.0])),
    )


def assert_within_float32(case: Case, fast: SparseKl, fast_grads: list[Tensor]) -> None:
    """The result for a float32 case is off by no more than float32 explains."""
    true, true_grads = run(reference, case.to(torch.float64))
    live_N = torch.isfinite(case.hidden_NH).all(-1)
    logits = case.hidden_NH[live_N] @ case.weight_VH.t()
    largest = max(1.0, logits.abs().max().item() if logits.numel() else 0.0)
    temperature = case.settings["temperature"]
    # a logit is off by a few float32 roundings (6e-8) of the largest; a logprob by that over T; T^2 multiplies the KL
    error = 1e-6 * largest * max(temperature, 1 / temperature) ** 2
    assert fast.loss.dtype == torch.float32
    torch.testing.assert_close(fast.loss, true.loss, rtol=1e-5, atol=error, check_dtype=False)
    torch.testing.assert_close(fast.kl_N, true.kl_N, rtol=1e-5, atol=error, check_dtype=False)
    torch.testing.assert_close(fast.ce_N, true.ce_N, rtol=1e-5, atol=error, check_dtype=False)
    # a probability is off by its logit's error, a gradient by that times what the probabilities multiply
    value = max(1.0, case.weight_VH.abs().max().item(), case.hidden_NH[live_N].abs().sum().item())
    for fast_grad, true_grad in zip(fast_grads, true_grads, strict=True):
        assert fast_grad.dtype == torch.float32
        torch.testing.assert_close(fast_grad, true_grad, rtol=1e-5, atol=error * value, check_dtype=False)
