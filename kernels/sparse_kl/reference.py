"""The loss in plain dense torch, gradients by autograd: the truth that the fast forms are tested against.

Takes any floating dtype. Float64 inputs are computed in float64 throughout, lower precisions from the logits on in
float32. Several [N, V] tensors stand in memory at once.

Legend: N rows, n rows of non-zero weight, K ids kept a row, V columns of the head, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    """The loss as `capgap.kernels.sparse_kl` defines it; `workspace_mb` is there for the signature and not used.

    Raises:
        ValueError: shapes, dtypes, devices or settings do not fit.
    """
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
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    weights_N = torch.ones(labels_N.shape, dtype=dtype, device=labels_N.device)
    if row_weights_N is not None:
        weights_N = row_weights_N.to(dtype)
    live_n = ((weights_N != 0) & (labels_N >= 0) & (labels_N < vocab_size)).nonzero()[:, 0]

    bias = None if bias_V is None else bias_V[:vocab_size]
    logits_nV = nn.functional.linear(hidden_NH[live_n], weight_VH[:vocab_size], bias).to(dtype)
    ce_n = nn.functional.cross_entropy(logits_nV, labels_N[live_n], reduction="none")
    kl_n = None
    if alpha > 0 or want_kl:
        tail_n = None if targets.tail_N is None else targets.tail_N[live_n].to(dtype)
        p_nV = _dense_targets(targets, live_n, vocab_size, dtype)
        kl_n = _forward_kl(torch.log_softmax(logits_nV / temperature, -1), p_nV, tail_n)

    loss_n = (1 - alpha) * ce_n
    if kl_n is not None and alpha > 0:
        loss_n = loss_n + alpha * temperature**2 * kl_n
    weights_n = weights_N[live_n]
    loss = (weights_n * loss_n).sum() / weights_n.sum() if len(live_n) else loss_n.sum()
    zeros_N = torch.zeros_like(weights_N)
    return SparseKl(
        loss,
        None if kl_n is None else zeros_N.index_copy(0, live_n, kl_n.detach()),
        zeros_N.index_copy(0, live_n, ce_n.detach()),
    )


def _dense_targets(targets: SparseTargets, live_n: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Probability of every id, repeated ids added up [n, V]; 0 for an id that is not kept."""
    ids_nK, weights_nK = targets.ids_NK[live_n], targets.weights_NK[live_n].to(dtype)
    valid_nK = (weights_nK > 0) & (ids_nK >= 0) & (ids_nK < vocab_size)
    dense_nV = torch.zeros((len(live_n), vocab_size), dtype=dtype, device=ids_nK.device)
    return dense_nV.scatter_add(1, ids_nK.where(valid_nK, 0), weights_nK.where(valid_nK, 0.0))


def _forward_kl(logq_nV: Tensor, p_nV: Tensor, tail_n: Tensor | None) -> Tensor:
    """KL of teacher and student on the kept ids and, where a tail is given, one bucket of all the others [n]."""
    kept_nV = p_nV > 0
    kl_n = (torch.xlogy(p_nV, p_nV) - p_nV * logq_nV).where(kept_nV, 0.0).sum(-1)
    if tail_n is None:
        return kl_n
    has_rest_n = ~kept_nV.all(-1)
    rest_nV = logq_nV.masked_fill(kept_nV & has_rest_n[:, None], float("-inf"))
    tail_n = tail_n.where(has_rest_n, 0.0)
    tail_kl_n = torch.xlogy(tail_n, tail_n) - tail_n * torch.logsumexp(rest_nV, -1)
    return kl_n + tail_kl_n.where(tail_n > 0, 0.0)
