"""The loss for a head that is split by vocabulary over the processes of a group.

    each process: its part of the logits  ->  logits of its kept ids, logsumexp of its other ids
    all-reduce of [C, K + 1 + 2 R] a chunk  ->  the K + 1 cells, equal on every process
    each process: its part of the gradient  ->  its part of the head's gradient; the hidden states' is summed once

It uses torch's rows kernel and runs eagerly, because a compiler would not see a collective inside a compiled graph.

Legend: N rows, n rows of non-zero weight, C rows of a chunk, K ids kept a row, v columns of this process, H hidden,
R processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from capgap.kernels.sparse_kl.checks import Loss, check_arguments, in_compute_dtype, workspace_bytes
from capgap.kernels.sparse_kl.chunks import Needs, chunk_rows, pitch, run_chunks
from capgap.kernels.sparse_kl.divergence import Divergence, Tail
from capgap.kernels.sparse_kl.op import scaled_grad
from capgap.kernels.sparse_kl.prepare import LiveRows, live_rows
from capgap.kernels.sparse_kl.rows import Rows, RowSettings
from capgap.kernels.sparse_kl.targets import SparseKl, SparseTargets
from capgap.kernels.sparse_kl.torch_rows import LogitSums, differentiate


def vocab_parallel_sparse_kl(
    hidden_NH: Tensor,
    weight_vH: Tensor,
    targets: SparseTargets,
    labels_N: Tensor,
    *,
    group: distributed.ProcessGroup,
    first_id: int,
    vocab_size: int,
    alpha: float,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    tail: Tail | None = None,
    beta: float = 0.5,
    row_weights_N: Tensor | None = None,
    bias_v: Tensor | None = None,
    softcap: float | None = None,
    workspace_mb: int = 256,
) -> SparseKl:
    """Compute `linear_sparse_kl` with a part of the head in each process; all processes get the same loss, KL and CE.

    Every process of the group must call it with the same rows and settings. The gradient of hidden is that of the whole
    loss, summed over the group; the gradient of the weight is that of the process's own part.

    Args:
        hidden_NH: The student's last hidden states, the same in every process.
        weight_vH: The head's rows of the ids from `first_id` on.
        targets: The teacher's distribution, with ids of the whole vocabulary.
        labels_N: Real next tokens, int64, of the whole vocabulary.
        group: The processes that hold the parts.
        first_id: Id of the first row of `weight_vH`.
        vocab_size: Number of real ids in the whole vocabulary; rows of `weight_vH` at or past it are padding.
        alpha: Weight of the KL, in [0, 1].
        temperature: The student's logits are divided by it for the KL.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        tail: Treatment of the teacher's probability outside the kept ids.
        beta: The parameter beta of `jsd`.
        row_weights_N: Weight of each row; None means 1 each.
        bias_v: The bias of the process's own part.
        softcap: c, if the model's logits are c tanh(logits / c).
        workspace_mb: Size in MiB of a chunk's logits and, if their dtype is not float32, of their float32 copy.

    Raises:
        TypeError, ValueError, RuntimeError: In the cases in which `linear_sparse_kl` raises them.
    """
    check_arguments(hidden_NH, weight_vH, targets, labels_N, row_weights_N, bias_v)
    if vocab_size < 1 or first_id < 0:
        raise ValueError(f"vocab_size, first_id: got {vocab_size}, {first_id}, expected at least 1, at least 0")
    loss = Loss(alpha, temperature, divergence, tail, beta, softcap)
    tail = loss.checked(targets)
    num_bytes = workspace_bytes(workspace_mb, hidden_NH, weight_vH)
    hidden_NH = in_compute_dtype(hidden_NH, weight_vH, bias_v)
    live = live_rows(
        hidden_NH.detach(),
        targets.ids_NK,
        targets.weights_NK.detach(),
        None if targets.tail_N is None else targets.tail_N.detach(),
        labels_N,
        None if row_weights_N is None else row_weights_N.detach(),
        alpha,
        temperature,
        tail,
        vocab_size,
        targets.checked,
    )
    num_columns = min(max(vocab_size - first_id, 0), len(weight_vH))
    settings = RowSettings(num_columns, temperature, divergence, beta, softcap)
    part = _Part(group, first_id, num_columns, -(-vocab_size // group.size()), num_bytes)
    scalar, kl_N, ce_N = _VocabParallel.apply(  # type: ignore[no-untyped-call]  # untyped in torch
        hidden_NH, weight_vH, bias_v, live, settings, part, alpha, torch.is_grad_enabled()
    )
    return SparseKl(scalar, kl_N, ce_N)


class _Part:
    """A rows kernel for this process's part of the vocabulary."""

    def __init__(
        self,
        group: distributed.ProcessGroup,
        first_id: int,
        num_columns: int,
        mean_columns: int,
        workspace_bytes: int,
    ) -> None:
        self.group = group
        self._first_id, self._num_columns = first_id, num_columns
        self._mean_columns, self._workspace_bytes = mean_columns, workspace_bytes

    def chunk_rows(self, hidden_nH: Tensor, dtype: torch.dtype) -> int:
        """Return the rows of a chunk, the same in every process, because each chunk is one collective."""
        num_bytes = hidden_nH.element_size() + (0 if hidden_nH.dtype == dtype else dtype.itemsize)
        return chunk_rows(len(hidden_nH), pitch(self._mean_columns) * num_bytes, self._workspace_bytes)

    def columns(self, rows: Rows) -> Rows:
        """Turn ids and labels into columns of this part; those of other parts get the column past the last."""
        return rows._replace(ids_NK=self._column(rows.ids_NK), labels_N=self._column(rows.labels_N))

    def _column(self, ids: Tensor) -> Tensor:
        columns = ids - self._first_id
        return columns.where((columns >= 0) & (columns < self._num_columns), self._num_columns)

    def __call__(
        self, logits_NP: Tensor, rows: Rows, settings: RowSettings, want_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the rows kernel that `rows.RowsKernel` describes on the whole chunk at once, with one collective."""

        def complete(sums: LogitSums) -> LogitSums:
            return self._complete(sums, rows)

        full_NP = logits_NP.to(rows.ckl_N.dtype)
        kl_N, ce_N = differentiate(full_NP, rows, settings, want_gradient, complete)
        if want_gradient and full_NP is not logits_NP:
            logits_NP.copy_(full_NP)
        return kl_N, ce_N

    def _complete(self, sums: LogitSums, rows: Rows) -> LogitSums:
        """Combine the sums of all processes; each entry comes from one process, so that all get the same bits."""
        top_k, size = sums.kept_BK.shape[1], self.group.size()
        packed = sums.kept_BK.new_zeros((len(sums.kept_BK), top_k + 1 + 2 * size))
        packed[:, :top_k] = sums.kept_BK.where(rows.ids_NK < self._num_columns, 0.0)
        packed[:, top_k] = sums.label_B.where(rows.labels_N < self._num_columns, 0.0)
        packed[:, top_k + 1 + self.group.rank()] = sums.rest_T_B
        packed[:, top_k + 1 + size + self.group.rank()] = sums.rest_1_B
        distributed.all_reduce(packed, group=self.group)
        kept_BK, label_B1, rest_T_BR, rest_1_BR = torch.split(packed, [top_k, 1, size, size], dim=1)
        return LogitSums(
            kept_BK.where(rows.p_NK > 0, float("-inf")),
            label_B1[:, 0],
            torch.logsumexp(rest_T_BR, -1),
            torch.logsumexp(rest_1_BR, -1),
        )


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        live: LiveRows,
        settings: RowSettings,
        part: _Part,
        alpha: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = Needs(*(with_grad and wanted for wanted in ctx.needs_input_grad[:3]))
        rows = part.columns(live.rows)
        num_chunk_rows = part.chunk_rows(live.hidden_nH, rows.ckl_N.dtype)
        kl_n, ce_n, grads = run_chunks(live.hidden_nH, weight_vH, bias_v, rows, settings, part, needs, num_chunk_rows)
        d_hidden_NH = grads.hidden_nH
        if d_hidden_NH is not None:
            distributed.all_reduce(d_hidden_NH, group=part.group)
            d_hidden_NH = live.spread(d_hidden_NH)
        scalar, per_weight = live.mean(kl_n, ce_n, alpha, settings.temperature)
        ctx.save_for_backward(d_hidden_NH, grads.weight_VH, grads.bias_V, per_weight)
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden_NH, weight_vH, bias_v)]
        kl_N, ce_N = live.spread(kl_n), live.spread(ce_n)
        ctx.mark_non_differentiable(kl_N, ce_N)
        return scalar, kl_N, ce_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True would treat the gradients as constants
            raise RuntimeError(
                "vocab_parallel_sparse_kl: got create_graph=True, expected False; it differentiates once only"
            )
        *grads, per_weight = ctx.saved_tensors
        scale = upstream * per_weight
        each = zip(grads, ctx.dtypes, strict=True)
        scaled = (None if grad is None else scaled_grad(grad, scale, dtype) for grad, dtype in each)
        return *scaled, None, None, None, None, None
