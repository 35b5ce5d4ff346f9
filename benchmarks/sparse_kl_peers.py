"""The losses that benchmarks/sparse_kl.py compares capgap's with, each as one forward and backward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from sparse_kl_ways import Problem, Way, backward
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

_CHUNK_OF_TOPK = 1024  # rows of a chunk, as in the trainers that use this loss


def peers(problem: Problem) -> dict[str, Way | None]:
    """Return the losses by name; None where a package, a new enough torch or a GPU is missing."""
    return {
        "unfused cross-entropy": backward(problem, lambda: _unfused_ce(problem)),
        "unfused sparse KL": backward(problem, lambda: _unfused_kl(problem)),
        "chunked by autograd, sparse KL": lambda: _chunked_kl(problem),
        "chunked by torch.func, compiled, top-k KL": _topk_of_chunks(problem),
        "torch linear_cross_entropy": _torch_chunked(problem),
        "cut cross-entropy": _cut_cross_entropy(problem),
        **_liger(problem),
    }


def _unfused_ce(problem: Problem) -> Tensor:
    return cross_entropy((problem.hidden_NH @ problem.weight_VH.T).float(), problem.labels_N)


def _unfused_kl(problem: Problem) -> Tensor:
    return _kl_of_logits(problem.hidden_NH @ problem.weight_VH.T, problem, slice(None))


def _kl_of_logits(logits_NV: Tensor, problem: Problem, rows: slice) -> Tensor:
    """Return the simplest loss with the gradient of `sampled`: without a tail and without the teacher's entropy."""
    logq_NK = log_softmax(logits_NV.float(), dim=-1).gather(1, problem.ids_NK[rows])
    return -(logq_NK * problem.sampled.weights_NK[rows]).sum() / problem.num_rows


def _chunked_kl(problem: Problem) -> None:
    """Run autograd chunk by chunk and sum the gradients, as chunking is written without a kernel."""
    d_hidden_NH = torch.empty_like(problem.hidden_NH)
    d_weight_VH = torch.zeros_like(problem.weight_VH)
    for start in range(0, problem.num_rows, problem.chunk_rows):
        rows = slice(start, start + problem.chunk_rows)
        hidden_CH = problem.hidden_NH[rows].detach().requires_grad_()
        loss = _kl_of_logits(hidden_CH @ problem.weight_VH.T, problem, rows)
        d_hidden_NH[rows], part_VH = torch.autograd.grad(loss, (hidden_CH, problem.weight_VH))
        d_weight_VH += part_VH


def _topk_of_chunks(problem: Problem) -> Way:
    """Return axolotl's top-k loss, which has no tail: compiled torch.func computes gradients chunk by chunk."""

    def loss(weight_VH: Tensor, hidden_CH: Tensor, ids_CK: Tensor, p_CK: Tensor) -> Tensor:
        logits_CV = (hidden_CH @ weight_VH.T).float()
        logq_CK = logits_CV.gather(1, ids_CK) - logits_CV.logsumexp(-1, keepdim=True)
        return (p_CK * (p_CK.clamp_min(1e-30).log() - logq_CK)).sum() / problem.num_rows

    # on a CPU, where only tests run this, "inductor" would need a C++ compiler
    engine = "inductor" if problem.device == "cuda" else "eager"
    step = torch.compile(torch.func.grad_and_value(loss, argnums=(0, 1)), backend=engine)

    def run() -> None:
        hidden_NH, weight_VH = problem.hidden_NH.detach(), problem.weight_VH.detach()
        d_hidden_NH, d_weight_VH = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH)
        for start in range(0, problem.num_rows, _CHUNK_OF_TOPK):
            rows = slice(start, start + _CHUNK_OF_TOPK)
            (part_VH, d_hidden_NH[rows]), _ = step(
                weight_VH, hidden_NH[rows], problem.ids_NK[rows], problem.sampled.weights_NK[rows]
            )
            d_weight_VH.add_(part_VH)

    return run


def _torch_chunked(problem: Problem) -> Way | None:
    """Return torch's own chunked cross-entropy, which torch has since 2.13."""
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError:
        return None
    options = LinearCrossEntropyOptions()
    return backward(
        problem,
        lambda: linear_cross_entropy(problem.hidden_NH, problem.weight_VH, problem.labels_N, options=options),
    )


def _cut_cross_entropy(problem: Problem) -> Way | None:
    """Return cut cross-entropy, which keeps no logits in memory; it needs the package and a GPU."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return None
    if problem.device == "cpu":
        return None
    return backward(problem, lambda: linear_cross_entropy(problem.hidden_NH, problem.weight_VH, problem.labels_N))


def _liger(problem: Problem) -> dict[str, Way | None]:
    """Return Liger's losses over a head, which need liger-kernel and a GPU. Its divergences need what a cache does not
    have: the teacher's hidden states and head, or its probabilities of the whole vocabulary."""
    names = ["cross-entropy", "cross-entropy in the same chunks", "JSD with a teacher on line", "KL of dense targets"]
    names = [f"Liger fused linear {name}" for name in names]
    try:
        from liger_kernel.transformers import functional, fused_linear_jsd, fused_linear_kl_div
    except ImportError:
        return dict.fromkeys(names)
    if problem.device == "cpu":
        return dict.fromkeys(names)
    hidden_NH, weight_VH, labels_N = problem.hidden_NH, problem.weight_VH, problem.labels_N
    teacher_NH, teacher_VH = torch.randn_like(hidden_NH), torch.randn_like(weight_VH) / problem.hidden**0.5
    dense_NV = torch.zeros(problem.num_rows, problem.vocab, dtype=hidden_NH.dtype, device=problem.device)
    dense_NV.scatter_(1, problem.ids_NK, problem.sampled.weights_NK.to(hidden_NH.dtype))
    jsd, kl = fused_linear_jsd.LigerFusedLinearJSD(), fused_linear_kl_div.LigerFusedLinearKLDivLoss()

    def ce(multiple: int) -> Callable[[], Tensor]:
        return lambda: functional.liger_fused_linear_cross_entropy(
            hidden_NH, weight_VH, labels_N, chunk_mem_const=multiple
        )

    losses = (
        ce(1),
        ce(_liger_multiple(problem)),
        lambda: jsd(hidden_NH, weight_VH, teacher_NH, teacher_VH, None),
        lambda: kl(hidden_NH, weight_VH, dense_NV),
    )
    return {name: backward(problem, loss) for name, loss in zip(names, losses, strict=True)}


def _liger_multiple(problem: Problem) -> int:
    """Return the least `chunk_mem_const` at which Liger's chunks have at least as many rows as capgap's."""
    for multiple in range(1, problem.vocab):
        num_parts = -(-problem.vocab // (multiple * problem.hidden))
        num_rows = 1 << (-(-problem.num_rows // num_parts) - 1).bit_length()
        if min(num_rows, problem.num_rows) >= problem.chunk_rows:
            return multiple
    return problem.vocab
