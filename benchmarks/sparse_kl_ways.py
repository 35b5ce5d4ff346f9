"""The ways that benchmarks/sparse_kl.py compares: each is one forward and backward; None where one is missing here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl

BASELINE = "chunked cross-entropy (alpha 0)"


class Problem:
    """Rows, a head and targets of one shape, random."""

    def __init__(self, num_rows: int, hidden: int, vocab: int, num_kept: int, device: str, workspace_mb: int) -> None:
        self.num_rows, self.hidden, self.vocab, self.num_kept = num_rows, hidden, vocab, num_kept
        self.device, self.workspace_mb = device, workspace_mb
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        self.hidden_NH = normal(num_rows, hidden).requires_grad_()
        self.weight_VH = (normal(vocab, hidden) / hidden**0.5).requires_grad_()
        self.labels_N = torch.randint(vocab, (num_rows,), device=device, generator=generator)
        first_N = torch.randint(vocab, (num_rows,), device=device, generator=generator)
        # distinct in a row, as a cache keeps them, and spread over the vocabulary
        self.ids_NK = (first_N[:, None] + torch.arange(num_kept, device=device) * (vocab // num_kept)) % vocab
        weights_NK = torch.rand(num_rows, num_kept, device=device, generator=generator)
        self.weights_NK = 0.9 * weights_NK / weights_NK.sum(-1, keepdim=True)
        self.tail_N = torch.full((num_rows,), 0.1, device=device)
        self.targets = SparseTargets(self.ids_NK, self.weights_NK, self.tail_N)
        self.sampled = SparseTargets(self.ids_NK, self.weights_NK / 0.9, recording="sampled")

    def shape(self) -> dict[str, int]:
        """What it is."""
        return {
            "num_rows": self.num_rows,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "num_kept": self.num_kept,
            "workspace_mb": self.workspace_mb,
        }

    @property
    def chunk_rows(self) -> int:
        """Rows whose logits fill the workspace."""
        num_bytes = self.vocab * self.hidden_NH.element_size()
        return min(self.num_rows, max(1, self.workspace_mb * 2**20 // num_bytes))


def ways(problem: Problem) -> dict[str, Callable[[], None] | None]:
    """By name, in the order in which they run; None where a package or a torch is missing."""

    def ours(**settings: Any) -> Callable[[], None]:
        targets = problem.sampled if settings.pop("sampled", False) else problem.targets

        def loss() -> Tensor:
            return linear_sparse_kl(
                problem.hidden_NH,
                problem.weight_VH,
                targets,
                problem.labels_N,
                workspace_mb=problem.workspace_mb,
                **settings,
            ).loss

        return _backward(problem, loss)

    return {
        BASELINE: ours(alpha=0.0, want_kl=False),
        "sparse KL, sampled": ours(alpha=1.0, sampled=True),
        "sparse KL, tail": ours(alpha=1.0),
        "sparse KL and cross-entropy": ours(alpha=0.5),
        "sparse KL, tail, T=2": ours(alpha=1.0, temperature=2.0),
        "reverse KL": ours(alpha=1.0, divergence="reverse_kl"),
        "JSD": ours(alpha=1.0, divergence="jsd"),
        "unfused cross-entropy": _backward(problem, lambda: _unfused_ce(problem)),
        "unfused sparse KL": _backward(problem, lambda: _unfused_kl(problem)),
        "chunked by autograd, sparse KL": lambda: _chunked_kl(problem),
        "torch linear_cross_entropy": _torch_chunked(problem),
        "Liger fused linear cross-entropy": _liger(problem),
        "three bare products": lambda: _three_products(problem),
    }


def _backward(problem: Problem, loss: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(loss(), (problem.hidden_NH, problem.weight_VH))

    return run


def _unfused_ce(problem: Problem) -> Tensor:
    return cross_entropy((problem.hidden_NH @ problem.weight_VH.T).float(), problem.labels_N)


def _unfused_kl(problem: Problem) -> Tensor:
    return _kl_of_logits(problem.hidden_NH @ problem.weight_VH.T, problem, slice(None))


def _kl_of_logits(logits_NV: Tensor, problem: Problem, rows: slice) -> Tensor:
    """Without a tail, and without the teacher's entropy: the plainest loss with the gradient of `sampled`."""
    logq_NK = log_softmax(logits_NV.float(), dim=-1).gather(1, problem.ids_NK[rows])
    return -(logq_NK * problem.sampled.weights_NK[rows]).sum() / problem.num_rows


def _chunked_kl(problem: Problem) -> None:
    """Autograd chunk by chunk, gradients summed as they come: how chunking is written without a kernel."""
    d_hidden_NH = torch.empty_like(problem.hidden_NH)
    d_weight_VH = torch.zeros_like(problem.weight_VH)
    for start in range(0, problem.num_rows, problem.chunk_rows):
        rows = slice(start, start + problem.chunk_rows)
        hidden_CH = problem.hidden_NH[rows].detach().requires_grad_()
        loss = _kl_of_logits(hidden_CH @ problem.weight_VH.T, problem, rows)
        d_hidden_NH[rows], part_VH = torch.autograd.grad(loss, (hidden_CH, problem.weight_VH))
        d_weight_VH += part_VH


def _three_products(problem: Problem) -> None:
    """What no loss over a full head can do without: logits, and a gradient for each side, in the same chunks."""
    hidden_NH, weight_VH = problem.hidden_NH.detach(), problem.weight_VH.detach()
    logits_CV = hidden_NH.new_empty((problem.chunk_rows, problem.vocab))
    d_hidden_NH, d_weight_VH = torch.empty_like(hidden_NH), torch.empty_like(weight_VH)
    for start in range(0, problem.num_rows, problem.chunk_rows):
        hidden_CH = hidden_NH[start : start + problem.chunk_rows]
        part_CV = logits_CV[: len(hidden_CH)]
        torch.mm(hidden_CH, weight_VH.T, out=part_CV)
        torch.mm(part_CV, weight_VH, out=d_hidden_NH[start : start + problem.chunk_rows])
        if start:
            d_weight_VH.addmm_(part_CV.T, hidden_CH)
        else:
            torch.mm(part_CV.T, hidden_CH, out=d_weight_VH)


def _torch_chunked(problem: Problem) -> Callable[[], None] | None:
    """torch's own chunked form, cross-entropy only; since 2.13."""
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError:
        return None
    options = LinearCrossEntropyOptions()
    return _backward(
        problem,
        lambda: linear_cross_entropy(problem.hidden_NH, problem.weight_VH, problem.labels_N, options=options),
    )


def _liger(problem: Problem) -> Callable[[], None] | None:
    """Liger's, cross-entropy only; needs liger-kernel and a GPU."""
    if problem.device == "cpu":
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    return _backward(problem, lambda: loss(problem.weight_VH, problem.hidden_NH, problem.labels_N))
