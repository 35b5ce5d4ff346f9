"""Logprobs of labels, computed from hidden states and differentiable row by row, without all logits in memory.

    forward:    hidden, head, labels -> logprobs [N]                     one product, in row chunks
    backward:   d loss / d logprob [N] -> d hidden, d head, d bias       the chunks' logits again, and two products

It is for losses in which a row's factor depends on other rows, such as divergences of spans. In backward, rows whose
factor is 0 are left out.

Legend: N rows, V columns of the head, H hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from capgap.kernels.sparse_kl.backends import kernel_for
from capgap.kernels.sparse_kl.checks import (
    check_arguments,
    check_softcap,
    check_vocab_size,
    in_compute_dtype,
    workspace_bytes,
)
from capgap.kernels.sparse_kl.chunks import Gradients, Needs, chunk_rows, pitch, run_chunks
from capgap.kernels.sparse_kl.prepare import LiveRows, live_rows, sum_dtype
from capgap.kernels.sparse_kl.rows import Backend, RowSettings
from capgap.kernels.sparse_kl.targets import SparseTargets


def linear_label_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int | None = None,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    workspace_mb: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the logprob of each row's label at temperature 1 [N], float32 (float64 for float64 inputs), in nats.

    A row without a label gets 0. Dtypes, autocast and memory are those of `linear_sparse_kl`. The result can be
    differentiated once.

    Args:
        hidden_NH: The student's last hidden states, of any floating dtype and any strides.
        weight_VH: The whole head, no shard and no DTensor; same dtype as hidden unless autocast is on.
        labels_N: Real next tokens, int64. A row whose label is outside [0, vocab_size) has no label.
        vocab_size: Columns at or past it have probability 0 and gradient exactly 0; None means all V are real.
        bias_V: The head's bias, same dtype as the weight.
        softcap: c, if the model's logits are c tanh(logits / c).
        workspace_mb: Size of the logits' buffer in MiB; None for the default of `linear_sparse_kl`.
        backend: The rows kernel, as for `linear_sparse_kl`.

    Raises:
        TypeError, ValueError: The arguments do not fit, as for `linear_sparse_kl`.
        RuntimeError: In backward, if `create_graph=True` was given.
    """
    none_N0 = SparseTargets(labels_N.new_empty((len(labels_N), 0)), hidden_NH.new_empty((len(labels_N), 0)))
    check_arguments(hidden_NH, weight_VH, none_N0, labels_N, None, bias_V)
    vocab_size = check_vocab_size(vocab_size, weight_VH.shape[0])
    check_softcap(softcap)
    num_bytes = workspace_bytes(workspace_mb, hidden_NH, weight_VH)
    hidden_NH = in_compute_dtype(hidden_NH, weight_VH, bias_V)
    found: Tensor = _op(hidden_NH, weight_VH, bias_V, labels_N, softcap or 0.0, vocab_size, num_bytes, backend)
    return found


def _run(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    factors_N: Tensor | None,
    softcap: float,
    vocab_size: int,
    workspace: int,
    backend: str,
    needs: Needs,
) -> tuple[LiveRows, Tensor, Gradients]:
    """Return the rows with a label and a nonzero factor, their cross-entropy, and the gradients of its weighted sum."""
    live = live_rows(hidden_NH, None, None, None, labels_N, factors_N, 0.0, 1.0, "drop", vocab_size)
    settings = RowSettings(vocab_size, 1.0, "forward_kl", 0.5, softcap or None)
    kernel = kernel_for(cast(Backend, backend), hidden_NH.device, hidden_NH.dtype)
    size = chunk_rows(len(live.hidden_nH), pitch(vocab_size) * hidden_NH.element_size(), workspace)
    _, ce_n, grads = run_chunks(live.hidden_nH, weight_VH, bias_V, live.rows, settings, kernel, needs, size)
    return live, ce_n, grads


@torch.library.custom_op("capgap::linear_label_logprobs", mutates_args=())
def _op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    softcap: float,
    vocab_size: int,
    workspace: int,
    backend: str,
) -> Tensor:
    live, ce_n, _ = _run(
        hidden_NH,
        weight_VH,
        bias_V,
        labels_N,
        None,
        softcap,
        vocab_size,
        workspace,
        backend,
        Needs(False, False, False),
    )
    return -live.spread(ce_n)


@torch.library.custom_op("capgap::linear_label_logprobs_backward", mutates_args=())
def _gradients(
    upstream_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    softcap: float,
    vocab_size: int,
    workspace: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    live, _, grads = _run(
        hidden_NH, weight_VH, bias_V, labels_N, -upstream_N, softcap, vocab_size, workspace, backend, Needs(*needs)
    )
    return (
        hidden_NH.new_empty(0) if grads.hidden_nH is None else live.spread(grads.hidden_nH),
        upstream_N.new_empty(0) if grads.weight_VH is None else grads.weight_VH,
        upstream_N.new_empty(0) if grads.bias_V is None else grads.bias_V,
    )


@_op.register_fake
def _(hidden_NH: Tensor, *others: Any) -> Tensor:
    return hidden_NH.new_empty(hidden_NH.shape[0], dtype=sum_dtype(hidden_NH))


@_gradients.register_fake
def _(upstream_N: Tensor, hidden_NH: Tensor, weight_VH: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = others[-1]
    return (
        hidden_NH.new_empty(hidden_NH.shape if needs[0] else 0),
        upstream_N.new_empty(weight_VH.shape if needs[1] else 0),
        upstream_N.new_empty(weight_VH.shape[:1] if needs[2] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph=True would treat the gradients as constants
        raise RuntimeError("linear_label_logprobs: got create_graph=True, expected False; it differentiates once only")
    inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    found = _gradients(upstream_N, *inputs, *ctx.settings, needs)
    each = zip(found, inputs, needs, strict=False)
    return *(grad.to(one.dtype) if needed else None for grad, one, needed in each), *[None] * 5


_op.register_autograd(_backward, setup_context=_setup_context)
