"""The loss on any device, in chunks of rows: the logits are never all in memory, and autograd does not record them.

The gradients are complete when forward returns; backward multiplies them by the upstream scalar. Memory in addition to
the inputs: one chunk of `workspace_mb`, the gradients (the weight's in float32), and a few MiB for a rows kernel. Rows
of weight 0 are left out of the products: they cost nothing, and NaN in them does not spread. The number of the other
rows determines the shapes of the products. On a GPU, counting them is the only host sync of a call, and there is none
if the caller passes the number.

Legend: N rows, n rows of non-zero weight, K ids kept a row, V columns of the head, H hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.backends import kernel_for
from capgap.kernels.sparse_kl.checks import (
    Loss,
    check_arguments,
    check_vocab_size,
    in_compute_dtype,
    workspace_bytes,
)
from capgap.kernels.sparse_kl.chunks import Needs, chunk_rows, pitch, run_chunks
from capgap.kernels.sparse_kl.divergence import Divergence, Tail
from capgap.kernels.sparse_kl.prepare import live_rows, sum_dtype
from capgap.kernels.sparse_kl.rows import Backend, RowSettings
from capgap.kernels.sparse_kl.targets import SparseKl, SparseTargets


def linear_sparse_kl(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    tail: Tail | None = None,
    beta: float = 0.5,
    row_weights_N: Tensor | None = None,
    vocab_size: int | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    want_kl: bool = True,
    num_counted: int | None = None,
    workspace_mb: int | None = None,
    backend: Backend = "auto",
) -> SparseKl:
    """Return sum_i w_i (alpha T^2 KL_i + (1 - alpha) CE_i) / sum_i w_i, and each row's KL and CE, in nats.

    KL stands for the chosen divergence. The loss is 0 if all weights are 0. Products are computed in the dtype of
    hidden, or in the autocast dtype if autocast is on; softmax, losses and sums over chunks in float32 (float64 for
    float64 inputs). Gradients flow from `loss` to hidden, weight and bias. The gradient of a float32 weight stays in
    float32 under autocast, without a rounding. Works under `torch.compile` and activation checkpointing.

    Args:
        hidden_NH: The student's last hidden states, of any floating dtype and any strides.
        weight_VH: The whole head, no shard and no DTensor; same dtype as hidden unless autocast is on.
        targets: The teacher's distribution.
        labels_N: Real next tokens, int64. A row whose label is outside [0, vocab_size) has weight 0.
        alpha: Weight of the KL, in [0, 1].
        temperature: The student's logits are divided by it for the KL; the CE is at temperature 1.
        divergence: `forward_kl`, `reverse_kl` or `jsd` (arXiv:2306.13649); README.md has the formulas.
        tail: Treatment of the teacher's probability outside the kept ids: `drop` leaves it out, `renorm` scales the
            kept ids to sum to 1, `ghost` compares it with the student's as one cell, `label` adds it to the label. None
            means `ghost` if the targets have a tail and `drop` otherwise.
        beta: For `jsd`, between 0 and 1: weight of KL(teacher || mixture), and the teacher's share of the mixture.
        row_weights_N: Weight of each row; None means 1 each.
        vocab_size: Columns at or past it have probability 0 and gradient exactly 0; None means all V are real.
        bias_V: The head's bias, same dtype as the weight.
        softcap: c, if the model's logits are c tanh(logits / c).
        want_kl: Whether to compute `kl_N` at alpha 0 too; False makes such a call a plain cross-entropy.
        num_counted: Number of rows with a nonzero weight, if it is known; it saves waiting for a GPU.
        workspace_mb: Size of the logits' buffer in MiB; it always holds at least one row. None means as much as
            backward needs anyway, and at least 16 on a CPU and 512 elsewhere.
        backend: The rows kernel; `auto` takes Triton's on a GPU, and torch's on a CPU, in float64 and without Triton.

    Raises:
        TypeError: Hidden, weight or bias is a DTensor.
        ValueError: Shapes, dtypes, devices or settings do not fit; the divergence is undefined or biased on these
            targets; on a CPU, a target of a row of nonzero weight is NaN, infinite or below 0 (elsewhere the loss
            becomes NaN).
        RuntimeError: In backward, if `create_graph=True` was given.
    """
    check_arguments(hidden_NH, weight_VH, targets, labels_N, row_weights_N, bias_V)
    vocab_size = check_vocab_size(vocab_size, weight_VH.shape[0])
    loss = Loss(alpha, temperature, divergence, tail, beta, softcap)
    tail = loss.checked(targets)
    num_bytes = workspace_bytes(workspace_mb, hidden_NH, weight_VH)
    hidden_NH = in_compute_dtype(hidden_NH, weight_VH, bias_V)

    use_kl = alpha > 0 or want_kl
    with_grad = torch.is_grad_enabled()
    scalar, kl_N, ce_N, *_ = _op(
        hidden_NH,
        weight_VH,
        bias_V,
        targets.ids_NK if use_kl else None,
        targets.weights_NK.detach() if use_kl else None,
        targets.tail_N.detach() if use_kl and targets.tail_N is not None else None,
        labels_N,
        None if row_weights_N is None else row_weights_N.detach(),
        [alpha, temperature, beta, softcap or 0.0],
        divergence,
        tail,
        vocab_size,
        num_bytes,
        backend,
        targets.checked,
        -1 if num_counted is None else num_counted,
        [with_grad and tensor is not None and tensor.requires_grad for tensor in (hidden_NH, weight_VH, bias_V)],
    )
    return SparseKl(scalar, kl_N if use_kl else None, ce_N)


def loss_and_gradients(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ids_NK: Tensor | None,
    p_NK: Tensor | None,
    tail_N: Tensor | None,
    labels_N: Tensor,
    row_weights_N: Tensor | None,
    numbers: list[float],
    divergence: str,
    tail: str,
    vocab_size: int,
    workspace: int,
    backend: str,
    checked: bool,
    num_counted: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss and what backward needs; this is the body of the registered op.

    `numbers` are alpha, temperature, beta and softcap (0 for none). If ids are None, there is no divergence.
    `workspace` is in bytes. A negative `num_counted` means that the number is unknown.

    Returns:
        Loss, KL [N], CE [N], the gradients of the weighted sum by hidden, weight and bias (empty if not needed), and
        1 / sum w.
    """
    alpha, temperature, beta, softcap = numbers
    live = live_rows(
        hidden_NH,
        ids_NK,
        p_NK,
        tail_N,
        labels_N,
        row_weights_N,
        alpha,
        temperature,
        tail,
        vocab_size,
        checked,
        None if num_counted < 0 else num_counted,
    )
    settings = RowSettings(vocab_size, temperature, cast(Divergence, divergence), beta, softcap or None)
    kl_n, ce_n, grads = run_chunks(
        live.hidden_nH,
        weight_VH,
        bias_V,
        live.rows,
        settings,
        kernel_for(cast(Backend, backend), hidden_NH.device, hidden_NH.dtype),
        Needs(*needs),
        chunk_rows(len(live.hidden_nH), pitch(vocab_size) * hidden_NH.element_size(), workspace),
    )
    scalar, per_weight = live.mean(kl_n, ce_n, alpha, temperature)
    return (
        scalar,
        live.spread(kl_n),
        live.spread(ce_n),
        _empty(hidden_NH) if grads.hidden_nH is None else live.spread(grads.hidden_nH),
        _empty(live.weights_n) if grads.weight_VH is None else grads.weight_VH,
        _empty(live.weights_n) if grads.bias_V is None else grads.bias_V,
        per_weight,
    )


_op = torch.library.custom_op("capgap::linear_sparse_kl", loss_and_gradients, mutates_args=())


@_op.register_fake
def _(hidden_NH: Tensor, weight_VH: Tensor, *others: Any) -> tuple[Tensor, ...]:
    needs = others[-1]
    sums = hidden_NH.new_empty((), dtype=sum_dtype(hidden_NH))
    return (
        torch.empty_like(sums),
        sums.new_empty(hidden_NH.shape[0]),
        sums.new_empty(hidden_NH.shape[0]),
        hidden_NH.new_empty(hidden_NH.shape if needs[0] else 0),
        sums.new_empty(weight_VH.shape if needs[1] else 0),
        sums.new_empty(weight_VH.shape[:1] if needs[2] else 0),
        torch.empty_like(sums),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.dtypes = inputs[-1], [None if one is None else one.dtype for one in inputs[:3]]
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True would treat the gradients as constants
        raise RuntimeError("linear_sparse_kl: got create_graph=True, expected False; it differentiates once only")
    *grads, per_weight = ctx.saved_tensors
    scaled: list[Tensor | None] = [None] * 3
    if upstream is not None:
        scale = upstream * per_weight
        each = zip(grads, ctx.dtypes, ctx.needs, strict=True)
        scaled = [scaled_grad(grad, scale, dtype) if needed else None for grad, dtype, needed in each]
    return *scaled, *[None] * 14


def scaled_grad(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product, computed in the dtype of the sums so that no loss scale overflows, and rounded once."""
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    return torch.mul(grad.to(scale.dtype), scale, out=out)


_op.register_autograd(_backward, setup_context=_setup_context)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)
