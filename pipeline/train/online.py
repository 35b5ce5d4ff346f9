"""The exact baseline: the teacher runs beside the student, and the divergence is over the whole vocabulary.

    tokens --student--> hidden [N, H] --+--> a chunk of rows: two logits [C, V] --> divergence, CE
       \\---teacher, frozen--> [N, G] --+        and at once their gradients: no logits are kept

It is for small models, as a reference for a training from a cache: only here are teacher and student on one device at
once. Everything except the targets is as in a training from a cache: sequences, order, optimizer and context rule.

Legend: B sequences, L targets a sequence, N = B x L rows, n rows that count, C rows of a chunk, V real vocabulary,
H hidden of the student, G hidden of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl import Divergence, SparseKl
from capgap.kernels.sparse_kl.chunks import has_wide_products
from capgap.kernels.sparse_kl.divergence import LOWEST_LOGPROB
from capgap.pipeline.models.head_product import float32_logits
from capgap.pipeline.store import Batch
from capgap.pipeline.train import heads
from capgap.pipeline.train.attention import ending_attention, rows_are_known
from capgap.pipeline.train.module import DistillationModule

# Elements of one [C, V] tensor, of which about eight exist at once. As float32 they take 4 MiB, which is about the size
# of a CPU's cache, or 128 MiB on a GPU.
_CHUNK_ELEMENTS_CPU = 2**20
_CHUNK_ELEMENTS_GPU = 2**25
# With fewer rows in a chunk, adding its gradient of the head [V, H] to the sum takes longer than computing it.
_MIN_CHUNK_ROWS = 256


class OnlineModule(DistillationModule):
    """A `DistillationModule` that learns from the teacher's whole distributions instead of the batch's targets.

    Args:
        *args: The arguments of `DistillationModule`.
        teacher: The teacher, on the device of the training. It is frozen, and is no part of the module's state.
        **kwargs: The keyword arguments of `DistillationModule`.

    Raises:
        InputError: The head of the student or of the teacher is not supported.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A module in a tuple is not registered as a submodule, so optimizer, checkpoints and strategies ignore it.
        self._teacher = (teacher.requires_grad_(False).eval(), heads.served_head(teacher, self._vocab_size))
        self._teacher_head = HeadWeights.from_teacher(self._teacher[1])

    def _loss_of(self, hidden_BLH: Tensor, batch: Batch, alpha: float) -> SparseKl:
        """Return the loss of a batch; in training mode its divergence is over all V probabilities.

        In evaluation mode, held-out sequences are measured against the cache, as in any other training.
        """
        if alpha == 0 or not self.training:
            return super()._loss_of(hidden_BLH, batch, alpha)
        student = self._head.inputs(hidden_BLH)
        return linear_full_kl(
            student["hidden_NH"],
            HeadWeights(student["weight_VH"], student["bias_V"], student["softcap"]),
            self._teacher_hidden(batch),
            self._teacher_head,
            batch.labels_BL.flatten(),
            alpha=alpha,
            temperature=self._temperature,
            divergence=self._objective.divergence,
            beta=self._objective.beta,
            row_weights_N=self._objective.row_weights(batch),
            vocab_size=self._vocab_size,
        )

    @torch.no_grad()
    def _teacher_hidden(self, batch: Batch) -> Tensor:
        """Return the teacher's hidden states [N, G], computed in its own dtype, whatever the student's precision is."""
        teacher, head = self._teacher
        several = {} if batch.positions_BL is None else ending_attention(teacher, batch.positions_BL)
        with torch.autocast(batch.input_ids_BL.device.type, enabled=False), rows_are_known(batch.positions_BL):
            output = head.decoder(input_ids=batch.input_ids_BL, use_cache=False, **several)
            hidden_NG: Tensor = output.last_hidden_state.flatten(0, 1)
            return hidden_NG


@dataclass(frozen=True)
class HeadWeights:
    """The weights and constants with which a head turns hidden states into logits.

    Attributes:
        weight_VH: The head's weight, whose rows past the real vocabulary are padding.
        bias_V: The head's bias, or None.
        softcap: The value c of a soft cap, by which logits z become c tanh(z / c); None without a cap.
        scale: The factor by which logits are multiplied before the cap.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def from_teacher(cls, head: heads.LmHead) -> HeadWeights:
        """Return the weights of a frozen teacher, in float32 if the device cannot sum 16-bit products in float32."""
        weight_VH = head.linear.weight.detach()
        if not has_wide_products(weight_VH.device):
            weight_VH = weight_VH.to(torch.promote_types(weight_VH.dtype, torch.float32))
        return cls(weight_VH, head.linear.bias, head.softcap, head.scale)

    def logits(self, hidden_CH: Tensor, vocab_size: int) -> Tensor:
        """Return the logits [C, V] of the real vocabulary, float32 (float64 for float64 inputs).

        The product is computed in the training's precision, which may be 16 bits under autocast.
        """
        logits_CV = linear(hidden_CH, *self._real(vocab_size))
        return self._changed(logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)))

    def exact_logits(self, hidden_CH: Tensor, vocab_size: int) -> Tensor:
        """Return the logits [C, V] without gradients and never rounded to 16 bits, like those a cache is made from."""
        return self._changed(float32_logits(hidden_CH, *self._real(vocab_size)))

    def _real(self, vocab_size: int) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias without padding, and unsliced if there is none, as a slice's gradient is a copy."""
        if len(self.weight_VH) == vocab_size:
            return self.weight_VH, self.bias_V
        return self.weight_VH[:vocab_size], None if self.bias_V is None else self.bias_V[:vocab_size]

    def _changed(self, logits_CV: Tensor) -> Tensor:
        if self.scale != 1:
            logits_CV = logits_CV * self.scale
        return logits_CV if self.softcap is None else self.softcap * torch.tanh(logits_CV / self.softcap)


def linear_full_kl(
    hidden_NH: Tensor,
    head: HeadWeights,
    teacher_hidden_NG: Tensor,
    teacher_head: HeadWeights,
    labels_N: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    row_weights_N: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> SparseKl:
    """Return the mean over rows of alpha T^2 KL + (1 - alpha) CE, where KL is over all V probabilities.

    The definitions are those of `linear_sparse_kl` at K = V. Gradients flow to the student's hidden states and head.
    Beyond inputs and gradients, memory holds the logits of one chunk of rows: the gradients of a chunk are computed
    together with its loss, and its logits are then freed.

    Args:
        hidden_NH: The student's last hidden states.
        head: The student's head.
        teacher_hidden_NG: The teacher's last hidden states.
        teacher_head: The teacher's head, which receives no gradient.
        labels_N: The real next tokens, int64. A row whose label lies outside [0, vocab_size) does not count.
        alpha: Weight of the KL, in [0, 1].
        temperature: The temperature T by which both models' logits are divided for the KL. CE is at temperature 1.
        divergence: `forward_kl`, `reverse_kl` or `jsd` (arXiv:2306.13649).
        beta: For `jsd`, the weight of KL(teacher || mixture) and the teacher's share of the mixture.
        row_weights_N: The weight of each row; equal weights where it is None.
        vocab_size: Size of the real vocabulary; columns at or past it are padding. None if all columns are real.
        chunk_rows: Number of rows whose logits are in memory together; None chooses a number that is fast.
    """
    vocab_size = len(head.weight_VH) if vocab_size is None else vocab_size
    live_n = ((labels_N >= 0) & (labels_N < vocab_size)).nonzero()[:, 0]
    if chunk_rows is None:
        elements = _CHUNK_ELEMENTS_CPU if hidden_NH.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
        chunk_rows = max(_MIN_CHUNK_ROWS, elements // vocab_size)

    def rows(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, chunk_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return the KL and the CE of each row of a chunk [C]."""
        student_CV = HeadWeights(weight_VH, bias_V, head.softcap).logits(hidden_CH, vocab_size)
        with torch.no_grad(), torch.autocast(hidden_CH.device.type, enabled=False):
            teacher_CV = teacher_head.exact_logits(teacher_hidden_NG[chunk_C], vocab_size).to(student_CV.dtype)
            logp_CV = torch.log_softmax(_softened(teacher_CV, temperature), -1)
        logq_CV = torch.log_softmax(_softened(student_CV, temperature), -1)
        own_CV = logq_CV if temperature == 1 else torch.log_softmax(student_CV, -1)
        ce_C = torch.nn.functional.nll_loss(own_CV, labels_N[chunk_C], reduction="none")
        return full_divergence(logp_CV, logq_CV, divergence, beta), ce_C

    wide = torch.promote_types(hidden_NH.dtype, torch.float32)
    if row_weights_N is None:
        shares_n = torch.full_like(live_n, 1 / max(1, len(live_n)), dtype=wide)
    else:
        shares_n = row_weights_N[live_n].to(wide)
        # If no row counts, the loss and its gradients are 0 instead of NaN.
        shares_n = shares_n / shares_n.sum().clamp_min(torch.finfo(wide).tiny)
    factors = (alpha * temperature**2, 1 - alpha)
    starts = range(0, len(live_n), chunk_rows)
    chunks = [(live_n[start : start + chunk_rows], shares_n[start : start + chunk_rows]) for start in starts]
    arguments = (hidden_NH, head.weight_VH, head.bias_V, rows, chunks, factors)
    loss, kl_N, ce_N = _SumOfChunks.apply(*arguments)  # type: ignore[no-untyped-call]
    return SparseKl(loss, kl_N, ce_N)


class _SumOfChunks(torch.autograd.Function):
    """The weighted sum of the chunks' losses; the forward pass computes the gradients too, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        rows: Callable[..., tuple[Tensor, Tensor]],
        chunks: Sequence[tuple[Tensor, Tensor]],
        factors: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and the KL and the CE of each row [N], which are 0 for rows that do not count."""
        inputs = (hidden_NH, weight_VH, bias_V)
        needed = [index for index in range(len(inputs)) if ctx.needs_input_grad[index]]
        sums = {index: torch.zeros_like(inputs[index]) for index in needed}  # type: ignore[arg-type]
        loss = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
        kl_N, ce_N = (loss.new_zeros(len(hidden_NH)) for _ in range(2))
        for chunk_C, shares_C in chunks:
            given = (hidden_NH[chunk_C], weight_VH, bias_V)
            leaves = [None if one is None else one.detach().requires_grad_(i in needed) for i, one in enumerate(given)]
            with torch.enable_grad():
                kl_C, ce_C = rows(*leaves, chunk_C)
                part = (shares_C * (factors[0] * kl_C + factors[1] * ce_C)).sum()
            learnt = [leaf for index, leaf in enumerate(leaves) if leaf is not None and index in needed]
            found = torch.autograd.grad(part, learnt) if needed else ()
            for index, gradient in zip(needed, found, strict=True):
                if index == 0:
                    sums[0][chunk_C] = gradient
                else:
                    sums[index] += gradient
            loss += part.detach()
            kl_N[chunk_C], ce_N[chunk_C] = kl_C.detach().to(kl_N.dtype), ce_C.detach().to(ce_N.dtype)
        ctx.needed = needed
        ctx.save_for_backward(*sums.values())
        ctx.mark_non_differentiable(kl_N, ce_N)
        return loss, kl_N, ce_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        """Return the stored gradients times the gradient of the loss."""
        given: list[Any] = [None] * 6
        for index, gradient in zip(ctx.needed, ctx.saved_tensors, strict=True):
            given[index] = gradient * grad
        return tuple(given)


def _softened(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV if temperature == 1 else logits_CV / temperature


def full_divergence(logp_NV: Tensor, logq_NV: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """Return the divergence of each row [N] in nats, computed by its definition.

    In the reverse KL a teacher's logprob below -30 counts as -30, as in `linear_sparse_kl`.

    Args:
        logp_NV: The teacher's logprobs.
        logq_NV: The student's logprobs.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        beta: The beta of `jsd`.
    """
    if divergence == "forward_kl":
        return _kl(logp_NV, logq_NV)
    if divergence == "reverse_kl":
        return _kl(logq_NV, logp_NV.clamp_min(LOWEST_LOGPROB))
    shares = torch.tensor([beta, 1 - beta], dtype=logp_NV.dtype, device=logp_NV.device).log()
    logm_NV = torch.logaddexp(logp_NV + shares[0], logq_NV + shares[1])
    return beta * _kl(logp_NV, logm_NV) + (1 - beta) * _kl(logq_NV, logm_NV)


def _kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    kl_N: Tensor = (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)
    return kl_N
