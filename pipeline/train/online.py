"""The undistorted baseline: the teacher in the loop, the divergence over the whole vocabulary.

    tokens --student--> hidden [N, H] --+--> a chunk of rows: two logits [C, V] --> divergence, CE
       \\---teacher, frozen--> [N, G] --+        and at once their gradients: no logits are kept

It is for small models, to hold a cached training against: this is the one place where teacher and student stand on a
device together. Everything but the target is that of the cached training: sequences, order, optimizer, context.

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

# Elements of one [C, V] tensor, of which about eight stand at once: 4 MiB of float32 near a CPU's cache, 128 on a GPU.
_CHUNK_ELEMENTS_CPU = 2**20
_CHUNK_ELEMENTS_GPU = 2**25
# With fewer rows, adding a chunk's gradient of the head [V, H] to the others' takes longer than making it.
_MIN_CHUNK_ROWS = 256


class OnlineModule(DistillationModule):
    """As `DistillationModule`, with the teacher's whole distribution in the place of the batch's targets.

    Args:
        *args: as `DistillationModule` takes them.
        teacher: on the device of the training; it is frozen here, and is no part of the module's state.
        **kwargs: as `DistillationModule` takes them.

    Raises:
        InputError: the teacher's head cannot be served, as the student's.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # in a tuple, and so no submodule: neither optimizer nor checkpoints nor strategies are to see it
        self._teacher = (teacher.requires_grad_(False).eval(), heads.served_head(teacher, self._vocab_size))
        self._teacher_head = HeadWeights.from_teacher(self._teacher[1])

    def _loss_of(self, hidden_BLH: Tensor, batch: Batch, alpha: float) -> SparseKl:
        """As `DistillationModule`; in training the divergence is that of all V probabilities.

        Held-out sequences are measured against the cache, as in any other training.
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
        """The teacher's hidden states, computed in its own dtype, whatever the student's precision is."""
        teacher, head = self._teacher
        several = {} if batch.positions_BL is None else ending_attention(teacher, batch.positions_BL)
        with torch.autocast(batch.input_ids_BL.device.type, enabled=False), rows_are_known(batch.positions_BL):
            output = head.decoder(input_ids=batch.input_ids_BL, use_cache=False, **several)
            hidden_NG: Tensor = output.last_hidden_state.flatten(0, 1)
            return hidden_NG


@dataclass(frozen=True)
class HeadWeights:
    """What turns hidden states into logits.

    Attributes:
        weight_VH: rows past the real vocabulary are padding.
        bias_V: None where there is none.
        softcap: c, where logits are c tanh(logits / c).
        scale: factor of the logits, before the cap.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def from_teacher(cls, head: heads.LmHead) -> HeadWeights:
        """Those of a frozen teacher; a copy in float32 where the device cannot sum 16-bit products in float32."""
        weight_VH = head.linear.weight.detach()
        if not has_wide_products(weight_VH.device):
            weight_VH = weight_VH.to(torch.promote_types(weight_VH.dtype, torch.float32))
        return cls(weight_VH, head.linear.bias, head.softcap, head.scale)

    def logits(self, hidden_CH: Tensor, vocab_size: int) -> Tensor:
        """[C, V] of the real vocabulary, as the training's precision has them: float32, or float64 for float64."""
        logits_CV = linear(hidden_CH, *self._real(vocab_size))
        return self._changed(logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32)))

    def exact_logits(self, hidden_CH: Tensor, vocab_size: int) -> Tensor:
        """As `logits`, never rounded to 16 bits and without gradients: as a cache would have them."""
        return self._changed(float32_logits(hidden_CH, *self._real(vocab_size)))

    def _real(self, vocab_size: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias without the padding; no slice where there is none, whose gradient would be a copy."""
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
    """Mean over rows of alpha T^2 KL + (1 - alpha) CE, where KL is of all V probabilities of teacher and student.

    The definitions are those of `linear_sparse_kl` at K = V. Gradients flow to the student's hidden states and head.
    Memory beyond the inputs and gradients is that of a chunk: its gradients are computed with its loss, and its logits
    given up.

    Args:
        hidden_NH: the student's last hidden states.
        head: the student's.
        teacher_hidden_NG: the teacher's last hidden states.
        teacher_head: the teacher's; nothing flows to it.
        labels_N: real next tokens, int64. A row whose label lies outside [0, vocab_size) does not count.
        alpha: share of the KL, in [0, 1].
        temperature: teacher's and student's logits are divided by it for the KL; CE is at temperature 1.
        divergence: `forward_kl`, `reverse_kl` or `jsd` (arXiv:2306.13649).
        beta: of `jsd`: weight of KL(teacher || mixture), and the teacher's share of the mixture.
        row_weights_N: what each row counts; all the same where it is left out.
        vocab_size: columns at or past it are padding; all are real where it is left out.
        chunk_rows: rows whose logits stand in memory together; left out, as many as are fast on the device.
    """
    vocab_size = len(head.weight_VH) if vocab_size is None else vocab_size
    live_n = ((labels_N >= 0) & (labels_N < vocab_size)).nonzero()[:, 0]
    if chunk_rows is None:
        elements = _CHUNK_ELEMENTS_CPU if hidden_NH.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
        chunk_rows = max(_MIN_CHUNK_ROWS, elements // vocab_size)

    def rows(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, chunk_C: Tensor) -> tuple[Tensor, Tensor]:
        """KL and CE of a chunk."""
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
        # without a row that counts the loss is 0, and so are its gradients
        shares_n = shares_n / shares_n.sum().clamp_min(torch.finfo(wide).tiny)
    factors = (alpha * temperature**2, 1 - alpha)
    starts = range(0, len(live_n), chunk_rows)
    chunks = [(live_n[start : start + chunk_rows], shares_n[start : start + chunk_rows]) for start in starts]
    arguments = (hidden_NH, head.weight_VH, head.bias_V, rows, chunks, factors)
    loss, kl_N, ce_N = _SumOfChunks.apply(*arguments)  # type: ignore[no-untyped-call]
    return SparseKl(loss, kl_N, ce_N)


class _SumOfChunks(torch.autograd.Function):
    """The weighted sum of the chunks' losses, whose gradients are made chunk by chunk on the way forward."""

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
        """The loss, and KL and CE [N] of each row, 0 where it does not count."""
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
        """The gradients, times that of the loss."""
        given: list[Any] = [None] * 6
        for index, gradient in zip(ctx.needed, ctx.saved_tensors, strict=True):
            given[index] = gradient * grad
        return tuple(given)


def _softened(logits_CV: Tensor, temperature: float) -> Tensor:
    return logits_CV if temperature == 1 else logits_CV / temperature


def full_divergence(logp_NV: Tensor, logq_NV: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """The divergence of each row, by its definition, from the log-probabilities of teacher p and student q [N, V].

    In the reverse KL a teacher's logprob below -30 counts as -30, as in `linear_sparse_kl`.
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
