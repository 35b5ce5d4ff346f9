"""The loss in plain dense torch with gradients by autograd, the reference against which the fast forms are tested.

It takes any floating dtype. Float64 inputs are computed in float64 throughout, and lower precisions in float32 from the
logits on. Several [N, V] tensors are in memory at once.

Legend: N rows, n rows of non-zero weight, K ids kept a row, V columns of the head, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from capgap.kernels.sparse_kl.checks import Loss, check_arguments, check_vocab_size
from capgap.kernels.sparse_kl.divergence import LOWEST_LOGPROB, Divergence, Tail
from capgap.kernels.sparse_kl.rows import Backend
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
    """Compute the loss of `capgap.kernels.sparse_kl.linear_sparse_kl`, whose arguments and results it shares.

    `num_counted`, `workspace_mb` and `backend` are not used; they are here so that the signatures agree.

    Raises:
        TypeError: An input is a DTensor.
        ValueError: Shapes, dtypes, devices or settings do not fit.
    """
    check_arguments(hidden_NH, weight_VH, targets, labels_N, row_weights_N, bias_V)
    vocab_size = check_vocab_size(vocab_size, weight_VH.shape[0])
    tail = Loss(alpha, temperature, divergence, tail, beta, softcap).checked(targets)
    dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
    weights_N = torch.ones(labels_N.shape, dtype=dtype, device=labels_N.device)
    if row_weights_N is not None:
        weights_N = row_weights_N.to(dtype)
    live_n = ((weights_N != 0) & (labels_N >= 0) & (labels_N < vocab_size)).nonzero()[:, 0]

    bias = None if bias_V is None else bias_V[:vocab_size]
    logits_nV = nn.functional.linear(hidden_NH[live_n], weight_VH[:vocab_size], bias).to(dtype)
    if softcap is not None:
        logits_nV = softcap * torch.tanh(logits_nV / softcap)
    ce_n = nn.functional.cross_entropy(logits_nV, labels_N[live_n], reduction="none")
    kl_n = None
    if alpha > 0 or want_kl:
        cells = _cells(targets, live_n, labels_N[live_n], tail, torch.log_softmax(logits_nV / temperature, -1))
        kl_n = _divergence(*cells, divergence, beta)

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


def _cells(
    targets: SparseTargets, live_n: Tensor, labels_n: Tensor, tail: Tail, logq_nV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for V + 1 possible cells, whether each exists, the teacher's probability and the student's logprob.

    Each kept id is a cell. The last cell is the rest of the vocabulary; it does not exist if every id is kept.
    """
    num_rows, vocab_size = logq_nV.shape
    ids_nK, weights_nK = targets.ids_NK[live_n], targets.weights_NK[live_n].to(logq_nV.dtype)
    valid_nK = (weights_nK > 0) & (ids_nK >= 0) & (ids_nK < vocab_size)
    p_nV = logq_nV.new_zeros((num_rows, vocab_size))
    p_nV = p_nV.scatter_add(1, ids_nK.where(valid_nK, 0), weights_nK.where(valid_nK, 0.0))
    left_n1 = logq_nV.new_zeros((num_rows, 1))
    if targets.tail_N is not None:
        left_n1 = targets.tail_N[live_n, None].to(logq_nV.dtype).clamp_min(0)
    if tail == "label":
        p_nV = p_nV.scatter_add(1, labels_n[:, None], left_n1)
    if tail == "renorm":
        mass_n1 = p_nV.sum(-1, keepdim=True)
        p_nV = p_nV / mass_n1.where(mass_n1 > 0, 1.0)
    kept_nV = p_nV > 0
    rest_n1 = ~kept_nV.all(-1, keepdim=True)
    rest_logq_nV = logq_nV.masked_fill(kept_nV & rest_n1, float("-inf"))
    return (
        torch.cat([kept_nV, rest_n1], 1),
        torch.cat([p_nV, left_n1 if tail == "ghost" else torch.zeros_like(left_n1)], 1)
        * torch.cat([kept_nV, rest_n1], 1),
        torch.cat([logq_nV, torch.logsumexp(rest_logq_nV, -1, keepdim=True)], 1),
    )


def _divergence(cell_nC: Tensor, p_nC: Tensor, logq_nC: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """Return the divergence of each row [n], nats, by its definition."""
    if divergence == "forward_kl":
        return (torch.xlogy(p_nC, p_nC) - p_nC * logq_nC).where(cell_nC, 0.0).sum(-1)
    q_nC = logq_nC.exp()
    if divergence == "reverse_kl":
        return (q_nC * (logq_nC - p_nC.log().clamp_min(LOWEST_LOGPROB))).where(cell_nC, 0.0).sum(-1)
    mixture_nC = (beta * p_nC + (1 - beta) * q_nC).clamp_min(torch.finfo(p_nC.dtype).tiny)
    from_teacher_n = (torch.xlogy(p_nC, p_nC) - p_nC * mixture_nC.log()).where(cell_nC, 0.0).sum(-1)
    from_student_n = (q_nC * (logq_nC - mixture_nC.log())).where(cell_nC, 0.0).sum(-1)
    return beta * from_teacher_n + (1 - beta) * from_student_n
