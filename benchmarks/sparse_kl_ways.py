"""The ways that benchmarks/sparse_kl.py measures: capgap's loss in its forms, each as one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.checks import workspace_bytes
from capgap.kernels.sparse_kl.chunks import chunk_rows, pitch

BASELINE = "chunked cross-entropy (alpha 0)"
PRODUCTS = "three bare products"
MIXED = "sparse KL and cross-entropy"
HALF_MASKED = "sparse KL and cross-entropy, half the rows masked"
MIXED_PRECISION = "sparse KL and cross-entropy, float32 head, bf16-mixed"
Way = Callable[[], None]


class Problem:
    """Random rows, head and targets of one shape."""

    def __init__(
        self, num_rows: int, hidden: int, vocab: int, top_k: int, device: str, workspace_mb: int | None
    ) -> None:
        self.num_rows, self.hidden, self.vocab, self.top_k = num_rows, hidden, vocab, top_k
        self.device, self.workspace_mb = device, workspace_mb
        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator).to(dtype)

        self.hidden_NH = normal(num_rows, hidden).requires_grad_()
        self.weight_VH = (normal(vocab, hidden) / hidden**0.5).requires_grad_()
        self.labels_N = torch.randint(vocab, (num_rows,), device=device, generator=generator)
        first_N = torch.randint(vocab, (num_rows,), device=device, generator=generator)
        # ids are distinct within a row, as in a cache, and spread over the vocabulary
        self.ids_NK = (first_N[:, None] + torch.arange(top_k, device=device) * (vocab // top_k)) % vocab
        weights_NK = torch.rand(num_rows, top_k, device=device, generator=generator)
        self.weights_NK = 0.9 * weights_NK / weights_NK.sum(-1, keepdim=True)
        self.tail_N = torch.full((num_rows,), 0.1, device=device)
        # marked as checked, as in a training, whose reader has checked the targets already
        self.targets = SparseTargets(self.ids_NK, self.weights_NK, self.tail_N, checked=True)
        self.sampled = SparseTargets(self.ids_NK, self.weights_NK / 0.9, recording="sampled", checked=True)

    def shape(self) -> dict[str, int | None]:
        """Return the sizes of the problem, for the results."""
        return {
            "num_rows": self.num_rows,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "top_k": self.top_k,
            "workspace_mb": self.workspace_mb,
        }

    @property
    def chunk_rows(self) -> int:
        """Number of rows in a chunk of the loss, and of the ways that are compared with it."""
        return chunk_rows(
            self.num_rows, self._row_bytes, workspace_bytes(self.workspace_mb, self.hidden_NH, self.weight_VH)
        )

    @property
    def formula_mb(self) -> float:
        """Peak MiB of forward and backward by the formula in the loss's README.md: the unscaled gradients, and either a
        chunk of logits or the scaled gradients."""
        num_bytes = self.hidden_NH.element_size()
        rows_bytes, head_bytes = self.num_rows * self.hidden * num_bytes, self.vocab * self.hidden * num_bytes
        sums_bytes = self.vocab * self.hidden * torch.float32.itemsize
        return (rows_bytes + sums_bytes + max(self.chunk_rows * self._row_bytes, rows_bytes + head_bytes)) / 2**20

    @property
    def _row_bytes(self) -> int:
        return pitch(self.vocab) * self.hidden_NH.element_size()


def ways(problem: Problem) -> dict[str, Way]:
    """Return the forms of the loss, and the bare products that each of them needs, by name."""

    def ours(**settings: Any) -> Way:
        targets = problem.sampled if settings.pop("sampled", False) else problem.targets
        labels_N = settings.pop("labels_N", problem.labels_N)
        weight_VH = settings.pop("weight_VH", problem.weight_VH)
        mixed = weight_VH is not problem.weight_VH

        def loss() -> Tensor:
            with torch.autocast(problem.device, torch.bfloat16, enabled=mixed):
                return linear_sparse_kl(
                    problem.hidden_NH,
                    weight_VH,
                    targets,
                    labels_N,
                    workspace_mb=problem.workspace_mb,
                    num_counted=problem.num_rows // (2 if labels_N is not problem.labels_N else 1),
                    **settings,
                ).loss

        return backward(problem, loss, weight_VH)

    every_other_N = torch.arange(problem.num_rows, device=problem.device) % 2 == 0
    return {
        BASELINE: ours(alpha=0.0, want_kl=False),
        PRODUCTS: lambda: _three_products(problem),
        "sparse KL, sampled": ours(alpha=1.0, sampled=True),
        "sparse KL, tail": ours(alpha=1.0),
        MIXED: ours(alpha=0.5),
        MIXED_PRECISION: ours(alpha=0.5, weight_VH=problem.weight_VH.detach().float().clone().requires_grad_()),
        HALF_MASKED: ours(alpha=0.5, labels_N=problem.labels_N.masked_fill(every_other_N, -100)),
        "sparse KL, tail, T=2": ours(alpha=1.0, temperature=2.0),
        "reverse KL": ours(alpha=1.0, divergence="reverse_kl"),
        "JSD": ours(alpha=1.0, divergence="jsd"),
    }


def backward(problem: Problem, loss: Callable[[], Tensor], weight_VH: Tensor | None = None) -> Way:
    """Return the forward and backward pass of a loss, with gradients of the problem's head or of another one."""
    leaves = (problem.hidden_NH, problem.weight_VH if weight_VH is None else weight_VH)

    def run() -> None:
        torch.autograd.grad(loss(), leaves)

    return run


def _three_products(problem: Problem) -> None:
    """Compute what every loss over a full head needs, in the same chunks: logits, and a gradient for each side."""
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
