"""The Lightning module that trains any Hugging Face causal language model with a fused head and loss.

Legend: B sequences, L targets a sequence, N = B x L rows, H hidden, K ids kept, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl import (
    Recording,
    SparseKl,
    SparseTargets,
    chunk_kl,
    chunk_sums,
    importance_ratio,
    linear_label_logprobs,
    linear_sparse_kl,
    policy_gradient,
)
from capgap.pipeline.store import Batch
from capgap.pipeline.train.attention import ending_attention, rows_are_known
from capgap.pipeline.train.faster import checkpoint_activations, compile_layers
from capgap.pipeline.train.heads import served_head
from capgap.pipeline.train.labels import LabelShares
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.optimizer import optimizer_and_schedule
from capgap.pipeline.train.router import RouterLoss
from capgap.pipeline.train.strategy import shard
from capgap.pipeline.train.top_ids import top_ids
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_train import USUAL_CLIP


class DistillationModule(lightning.LightningModule):
    """Computes `alpha T^2 KL + (1 - alpha) CE` of a batch; with alpha 0 it is plain language-model training.

    The loss of a step is the weighted mean over all its rows, however they are spread over micro-batches. Parts of the
    model that do not contribute to its logits, such as a vision tower, are frozen.

    Args:
        model: The student.
        settings: The learning rate, the weight decay and further settings of the optimization.
        num_steps: Number of optimizer steps in the whole training.
        alpha: Weight of the KL in the first step, in [0, 1].
        temperature: Temperature T of the targets.
        vocab_size: Size of the real vocabulary; rows of the head past it are padding.
        objective: The divergence that is used as KL, how alpha changes, and the weights of rows.
        num_micro_batches: Number of micro-batches in a step, over all ranks.

    Attributes:
        last: The loss of the last micro-batch, with the KL and the cross-entropy of its rows.
        top_N: The top-1 tokens of the last micro-batch with targets that was measured in evaluation mode, int64.
        gradient_norm: The norm of the last step's gradient before clipping; a scalar tensor.

    Raises:
        InputError: The fused loss does not support the model's head or router, or the model does not support
            activation checkpointing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OptimizationSettings,
        num_steps: int,
        alpha: float,
        temperature: float,
        vocab_size: int,
        objective: Objective = Objective(),  # noqa: B008  # frozen
        num_micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self._head = served_head(model, vocab_size)
        self._router = RouterLoss(model) if objective.router_loss_weight > 0 else None
        self.model = model
        self._settings, self._num_steps = settings, num_steps
        self._alpha, self._temperature, self._vocab_size = alpha, temperature, vocab_size
        self._objective = objective
        self._num_micro_batches, self._shares = num_micro_batches, LabelShares()
        self.last: SparseKl | None = None
        self.gradient_norm = torch.zeros(())
        self.top_N: torch.Tensor | None = None
        _freeze_all_but(model, self._head.decoder, self._head.linear)
        self._frozen = frozenset(
            name for name, one in self.named_parameters(remove_duplicate=False) if not one.requires_grad
        )
        # Lightning reads it: whether a checkpoint must contain every parameter.
        self.strict_loading = not self._frozen
        if settings.activation_checkpointing:
            checkpoint_activations(model)

    def on_fit_start(self) -> None:
        """Compile the layers, if the settings ask for it, once the model is on the device of the training."""
        if self._settings.compile:
            compile_layers(self.model, self._head.decoder, self.device)

    def configure_model(self) -> None:
        """Divide the parameters among the ranks, if the strategy has a device mesh."""
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            shard(self, self.model, self.device_mesh["data_parallel"], self._settings.precision)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out of the checkpoint, because they are those of the model's own folder."""
        saved = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in saved.items() if name not in self._frozen}

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return the loss of a micro-batch, times its share of labels where a step has several micro-batches."""
        alpha = self._objective.alpha(self._alpha, self.global_step, self._num_steps)
        self.last = self.loss(batch, alpha)
        if self._num_micro_batches == 1:
            return self.last.loss
        return self._shares.weigh(self.last.loss, self._counted(batch))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Rescale the gradient into that of the mean over all labels of the step."""
        if self._num_micro_batches > 1:
            self._shares.settle(self.model.parameters(), self._num_micro_batches)

    def loss(self, batch: Batch, alpha: float) -> SparseKl:
        """Return the loss of a batch, and the KL and cross-entropy of each of its N rows.

        In training mode the loss includes the router's load-balancing loss, if the objective asks for it.

        Args:
            batch: The micro-batch, on the module's device.
            alpha: Weight of the KL, in [0, 1].

        Raises:
            InputError: Rows hold several sequences or documents, and the model's attention reaches across them.
        """
        several = {} if batch.positions_BL is None else ending_attention(self.model, batch.positions_BL)
        router = self._router if self.training else None
        with rows_are_known(batch.positions_BL):
            output = self._head.decoder(
                input_ids=batch.input_ids_BL, use_cache=False, **several, **(router.arguments if router else {})
            )
        result = self._loss_of(output.last_hidden_state, batch, alpha)
        if not self.training and batch.ids_NK is not None and batch.chunk_left_N is None:
            # It is computed here because FSDP2 gathers the head for the duration of this method.
            read = self._head.inputs(output.last_hidden_state.detach())
            self.top_N = top_ids(read["hidden_NH"], read["weight_VH"].detach(), read["bias_V"], self._vocab_size)
        if router is None:
            return result
        return result._replace(loss=result.loss + self._objective.router_loss_weight * router(output))

    def _loss_of(self, hidden_BLH: torch.Tensor, batch: Batch, alpha: float) -> SparseKl:
        if batch.chunk_left_N is not None:
            return self._loss_of_chunks(hidden_BLH, batch, alpha)
        if self.training and alpha > 0 and self._objective.ratio_clip and batch.writer_logprobs_N is not None:
            return self._policy_gradient(hidden_BLH, batch, alpha, self._objective.ratio_clip)
        targets = _targets(batch)
        objective = self._objective if self.training else self._objective.measured_on(targets.recording)
        return linear_sparse_kl(
            **self._head.inputs(hidden_BLH),
            targets=targets,
            labels_N=batch.labels_BL.flatten(),
            alpha=alpha,
            temperature=self._temperature,
            row_weights_N=self._objective.row_weights(batch),
            vocab_size=self._vocab_size,
            want_kl=alpha > 0,
            num_counted=batch.num_counted,
            **(objective.arguments() if alpha > 0 else {}),
        )

    def _policy_gradient(self, hidden_BLH: torch.Tensor, batch: Batch, alpha: float, clip: float) -> SparseKl:
        """Return alpha times the policy-gradient loss plus 1 - alpha times the cross-entropy.

        The KL of a row is the importance ratio times the difference of the student's and the teacher's logprob. Only
        its mean estimates a divergence: the value of a single row may be negative.
        """
        assert batch.writer_logprobs_N is not None and batch.teacher_logprobs_N is not None
        labels_N = batch.labels_BL.flatten()
        counts_N = (labels_N >= 0) & (labels_N < self._vocab_size)
        logprobs_N = linear_label_logprobs(
            **self._head.inputs(hidden_BLH), labels_N=labels_N, vocab_size=self._vocab_size
        )
        teacher_N, writer_N = (
            one_N.where(counts_N, 0.0) for one_N in (batch.teacher_logprobs_N, batch.writer_logprobs_N)
        )
        weights_N = self._objective.row_weights(batch)
        weights_N = counts_N.to(logprobs_N.dtype) if weights_N is None else counts_N * weights_N
        loss_N = alpha * policy_gradient(logprobs_N, teacher_N, writer_N, clip) - (1 - alpha) * logprobs_N
        loss = (weights_N * loss_N).sum() / weights_N.sum().clamp_min(torch.finfo(loss_N.dtype).tiny)
        logprobs_N = logprobs_N.detach()
        kl_N = importance_ratio(logprobs_N, writer_N) * (logprobs_N - teacher_N)
        return SparseKl(loss, kl_N.where(counts_N, 0.0), -logprobs_N)

    @property
    def clip(self) -> float:
        """The largest difference from 1 at which an importance ratio is not yet clipped."""
        return self._objective.ratio_clip or USUAL_CLIP

    def divergence_name(self, batch: Batch) -> str:
        """Return a readable name of the divergence that the loss of a batch uses, for the progress bar."""
        if self._objective.ratio_clip and batch.writer_logprobs_N is not None:
            return "reverse KL from the student's tokens"
        name = {"forward_kl": "KL", "reverse_kl": "reverse KL", "jsd": "JSD"}[self._objective.divergence]
        if batch.chunk_left_N is not None:
            return f"{name} of chunks to the teacher"
        target = "the teacher" if batch.ids_NK is None else "samples" if batch.tail_N is None else "the top-k tokens"
        return f"{name} to {target}"

    def _loss_of_chunks(self, hidden_BLH: torch.Tensor, batch: Batch, alpha: float) -> SparseKl:
        """Return alpha times the chunks' divergences plus 1 - alpha times the cross-entropies, as a mean over labels.

        A label outside all chunks counts with its whole cross-entropy; otherwise text for which the teacher gives no
        likelihood would weigh less than other text. `projected_weight` times the divergences of projected targets, also
        over the number of labels, is added.
        """
        assert batch.chunk_left_N is not None and batch.chunk_logprobs_N is not None
        labels_N = batch.labels_BL.flatten()
        logprobs_N = linear_label_logprobs(
            **self._head.inputs(hidden_BLH), labels_N=labels_N, vocab_size=self._vocab_size
        )
        sums_N = chunk_sums(logprobs_N, batch.chunk_left_N)
        divergence_N = chunk_kl(batch.chunk_logprobs_N, sums_N, self._temperature, self._objective.of_chunks)
        kl_N = divergence_N.where(batch.chunk_left_N == 0, 0.0)
        count = ((labels_N >= 0) & (labels_N < self._vocab_size)).sum().clamp(min=1)
        ce_weight_N = torch.where(batch.chunk_left_N < 0, 1.0, 1 - alpha)
        loss = (alpha * kl_N.sum() - (ce_weight_N * logprobs_N).sum()) / count
        if self._objective.projected_weight > 0 and alpha > 0:
            loss = loss + self._objective.projected_weight * self._projected(hidden_BLH, batch) / count
        return SparseKl(loss, kl_N.detach(), -logprobs_N.detach())

    def _projected(self, hidden_BLH: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the sum of the divergences of projected targets at temperature 1."""
        assert batch.weights_NK is not None
        has_N = (batch.weights_NK.amax(dim=1) > 0).float()
        found = linear_sparse_kl(
            **self._head.inputs(hidden_BLH),
            targets=_targets(batch),
            labels_N=batch.labels_BL.flatten(),
            alpha=1.0,
            divergence=self._objective.of_chunks,
            row_weights_N=has_N,
            vocab_size=self._vocab_size,
        )
        # The loss is a mean over the rows with a projected target.
        return found.loss * has_N.sum()

    def configure_optimizers(self) -> Any:
        """Return AdamW and its learning rate schedule, which moves at every optimizer step."""
        return optimizer_and_schedule(self.model.parameters(), self._settings, self._num_steps)

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **also_unused: Any) -> None:
        """Clip the step's gradient.

        Lightning's own clipping refuses fused optimizers under mixed precision because of gradient scaling, which
        bfloat16 does not need.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _counted(self, batch: Batch) -> torch.Tensor:
        """Return the weights of the rows with a label over the number of all rows, a scalar, without a host sync."""
        labels_N = batch.labels_BL.flatten()
        weights_N = self._objective.row_weights(batch)
        if weights_N is None and batch.num_counted is not None:
            # The value is filled in on the device, because a copy from the host would have to be waited for.
            share = batch.num_counted / batch.num_tokens
            return torch.full((), share, dtype=torch.float64, device=labels_N.device)
        counts_N = ((labels_N >= 0) & (labels_N < self._vocab_size)).float()
        return (counts_N if weights_N is None else counts_N * weights_N).mean(dtype=torch.float64)


def _freeze_all_but(model: PreTrainedModel, *parts: torch.nn.Module) -> None:
    used = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def _targets(batch: Batch) -> SparseTargets:
    if batch.ids_NK is None or batch.weights_NK is None:
        num_rows, device = batch.num_tokens, batch.labels_BL.device
        none = torch.zeros((num_rows, 1), device=device)
        return SparseTargets(none.long(), none, None)
    recording: Recording = "sampled" if batch.tail_N is None else "topk"
    # The ids in a cache are distinct, and its reader has checked every value, so they are not checked again.
    return SparseTargets(batch.ids_NK, batch.weights_NK, batch.tail_N, recording, checked=True)
