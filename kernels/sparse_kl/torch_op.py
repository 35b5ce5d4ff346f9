"""The loss on any device, in row chunks: logits never stand in memory at once, and no graph is built over them.

    for each chunk: buffer = hidden @ head^T  ->  buffer becomes d loss / d logits  ->  two products, the gradients

The gradients are complete when forward returns; backward multiplies them by the upstream scalar. Memory beyond the
inputs: one chunk of `workspace_mb`, the gradients (the weight's in float32), and at a temperature other than 1 a few
MiB. Rows of weight 0 never reach a product: they cost nothing, and NaN in them stays there. Counting the others is one
host sync a call off the CPU.

Legend: N rows, n rows of non-zero weight, K ids kept a row, V columns of the head, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.chunks import Chunks
from capgap.kernels.sparse_kl.rows import Rows
from capgap.kernels.sparse_kl.targets import SparseKl, SparseTargets, check_arguments


def linear_sparse_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    row_weights_N: Tensor | None = None,
    vocab_size: int | None = None,
    bias_V: Tensor | None = None,
    want_kl: bool = True,
    workspace_mb: int = 256,
) -> SparseKl:
    """sum_i w_i (alpha T^2 KL_i + (1 - alpha) CE_i) / sum_i w_i, and each row's KL and CE; 0 if all weights are 0.

    Products are computed in the dtype of hidden, or in the autocast dtype where autocast is on; softmax, losses and
    sums over chunks in float32 (float64 for float64 inputs). Gradients flow from `loss` to hidden, weight and bias.

    Args:
        hidden_NH: the student's last hidden states, any floating dtype, any strides.
        weight_VH: the head, same dtype as hidden unless autocast is on.
        targets: the teacher's distribution.
        labels_N: real next tokens, int64. A row whose label lies outside [0, vocab_size) has weight 0.
        alpha: share of the KL, in [0, 1].
        temperature: the student's logits are divided by it for the KL; CE is at temperature 1.
        row_weights_N: weight of each row; None means 1 each.
        vocab_size: columns at or past it have probability 0 and gradient exactly 0; None means all V are real.
        bias_V: the head's bias, same dtype as the weight.
        want_kl: at alpha 0, whether to compute `kl_N` nevertheless; False makes the call a plain cross-entropy.
        workspace_mb: size of the logits buffer in MiB; at least one row is held whatever it says. On a CPU 16 is faster
            still; on a GPU a chunk should have 1500 rows or more.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit.
        RuntimeError: in backward, where a graph of it is wanted.
    """
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
        hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    vocab_size = check_arguments(
        hidden_NH,
        weight_VH,
        targets,
        labels_N,
        alpha=alpha,
        temperature=temperature,
        row_weights_N=row_weights_N,
        vocab_size=vocab_size,
        bias_V=bias_V,
    )
    if weight_VH.dtype != hidden_NH.dtype or (bias_V is not None and bias_V.dtype != hidden_NH.dtype):
        raise ValueError(f"weight_VH, bias_V: got {weight_VH.dtype}, expected {hidden_NH.dtype}, the dtype of hidden")
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb: got {workspace_mb}, expected at least 1")

    use_kl = alpha > 0 or want_kl
    if not use_kl:
        targets = SparseTargets(targets.ids_NK[:, :0], targets.weights_NK[:, :0])
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    weights_N = torch.ones(labels_N.shape, dtype=dtype, device=labels_N.device)
    if row_weights_N is not None:
        weights_N = row_weights_N.detach().to(dtype)
    live_N = (weights_N != 0) & (labels_N >= 0) & (labels_N < vocab_size)
    live_n = live_N.nonzero()[:, 0]
    weights_N = weights_N.where(live_N, 0.0)
    rows = Rows(
        ids_BK=targets.ids_NK,
        weights_BK=targets.weights_NK.detach().to(dtype),
        tail_B=None if targets.tail_N is None else targets.tail_N.detach().to(dtype),
        labels_B=labels_N,
        kl_scale_B=weights_N * (alpha * temperature),
        ce_scale_B=weights_N * (1 - alpha),
    )
    chunks = Chunks(
        rows=rows,
        live_n=None if len(live_n) == len(labels_N) else live_n,
        vocab_size=vocab_size,
        temperature=temperature,
        workspace_bytes=workspace_mb * 2**20,
    )
    with_grad = torch.is_grad_enabled()
    loss, kl_N, ce_N = _LinearSparseKl.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        hidden_NH, weight_VH, bias_V, chunks, weights_N, alpha, with_grad
    )
    return SparseKl(loss, kl_N if use_kl else None, ce_N)


class _LinearSparseKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        chunks: Chunks,
        weights_N: Tensor,
        alpha: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = tuple(with_grad and wanted for wanted in ctx.needs_input_grad[:3])
        kl_N, ce_N, grads = chunks.run(hidden_NH, weight_VH, bias_V, needs)
        total = weights_N.sum()
        per_weight = torch.where(total != 0, 1 / total, 0.0)
        kl_share = alpha * chunks.temperature**2
        loss = (weights_N * (kl_share * kl_N + (1 - alpha) * ce_N)).sum() * per_weight
        ctx.save_for_backward(*grads, per_weight)
        ctx.mark_non_differentiable(kl_N, ce_N)
        ctx.dtype = weight_VH.dtype
        return loss, kl_N, ce_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients would pass for constants
            raise RuntimeError("linear_sparse_kl: got create_graph=True, expected False; it differentiates once only")
        *grads, per_weight = ctx.saved_tensors
        scale = upstream * per_weight
        scaled = (None if grad is None else (grad * scale).to(ctx.dtype) for grad in grads)
        return *scaled, None, None, None, None
