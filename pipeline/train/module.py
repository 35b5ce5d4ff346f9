"""The Lightning module: any Hugging Face causal language model, its head and loss replaced by the fused one.

Legend: B sequences, L targets a sequence, N = B x L rows, H hidden, K ids kept, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import lightning
import torch
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from capgap.kernels.sparse_kl import Recording, SparseKl, SparseTargets, linear_sparse_kl
from capgap.pipeline.store import Batch
from capgap.pipeline.train.labels import LabelShares
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.strategy import shard
from capgap.schemas.errors import InputError
from capgap.schemas.run_model import OptimizationSettings

# Where the logits' buffer and the gradients of one chunk stay in a CPU's cache.
_CPU_WORKSPACE_MB = 16
_GPU_WORKSPACE_MB = 512
# whose masks transformers makes from positions, in batches of any number of rows
_ATTENTION_THAT_ENDS = ("eager", "sdpa", "flex_attention")


class DistillationModule(lightning.LightningModule):
    """Computes `alpha T^2 KL + (1 - alpha) CE` of a batch; with alpha 0 it is plain language-model training.

    Args:
        model: the student.
        settings: learning rate, decay and so on.
        num_steps: optimizer steps of the whole training.
        alpha: weight of the KL.
        temperature: of the targets.
        vocab_size: real vocabulary; the head's rows past it are padding.
        objective: what stands for the KL.
        num_micro_batches: of a step, over all ranks.
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
        _require_known_head(model)
        self.model = model
        self._softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._settings, self._num_steps = settings, num_steps
        self._alpha, self._temperature, self._vocab_size = alpha, temperature, vocab_size
        self._objective = objective
        self._num_micro_batches, self._shares = num_micro_batches, LabelShares()
        self.last: SparseKl | None = None

    def configure_model(self) -> None:
        """Divide the parameters among the ranks, where the strategy has a mesh to divide them over."""
        if self.device_mesh is not None and not isinstance(self, FSDPModule):
            shard(self, self.model, self.device_mesh["data_parallel"], self._settings.precision)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Loss of one micro-batch, by its share of the step's labels."""
        self.last = self.loss(batch, self._alpha)
        if self._num_micro_batches == 1:
            return self.last.loss
        return self._shares.weigh(self.last.loss, batch.labels_BL)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Make the gradient that of the mean over the labels of the whole step."""
        if self._num_micro_batches > 1:
            self._shares.settle(self.model.parameters(), self._num_micro_batches)

    def loss(self, batch: Batch, alpha: float) -> SparseKl:
        """Loss of a batch, and the KL and cross-entropy of each of its N rows.

        Raises:
            InputError: rows hold several sequences, and the model would look across them.
        """
        several = {} if batch.positions_BL is None else _ending_attention(self.model, batch.positions_BL)
        hidden_BLH = self.model.base_model(input_ids=batch.input_ids_BL, use_cache=False, **several).last_hidden_state
        head = self.model.get_output_embeddings()
        on_cpu = hidden_BLH.device.type == "cpu"
        return linear_sparse_kl(
            hidden_BLH.flatten(0, 1),
            head.weight,
            _targets(batch),
            batch.labels_BL.flatten(),
            alpha=alpha,
            temperature=self._temperature,
            vocab_size=self._vocab_size,
            bias_V=getattr(head, "bias", None),
            softcap=self._softcap,
            want_kl=alpha > 0,
            workspace_mb=_CPU_WORKSPACE_MB if on_cpu else _GPU_WORKSPACE_MB,
            **(self._objective.arguments() if alpha > 0 else {}),
        )

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and cosine decay, stepped every optimizer step."""
        settings = self._settings
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(settings, step, self._num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *unused: Any, **also_unused: Any) -> None:
        """Clip the step's gradient; Lightning's own clipping refuses fused optimizers under mixed precision.

        Its reason is gradient scaling, which bfloat16 does without.
        """
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)


def learning_rate_factor(settings: OptimizationSettings, step: int, num_steps: int) -> float:
    """The learning rate of a step over its peak."""
    warmup = settings.warmup_fraction * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(num_steps - 1 - warmup, 1)
    low = settings.final_learning_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _targets(batch: Batch) -> SparseTargets:
    if batch.ids_NK is None or batch.weights_NK is None:
        num_rows, device = batch.num_tokens, batch.labels_BL.device
        none = torch.zeros((num_rows, 1), device=device)
        return SparseTargets(none.long(), none, None)
    recording: Recording = "sampled" if batch.tail_N is None else "topk"
    return SparseTargets(batch.ids_NK, batch.weights_NK, batch.tail_N, recording)


def _ending_attention(model: PreTrainedModel, positions_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that ends attention where positions begin anew.

    Transformers' flash attention minds positions in batches of one row alone.
    """
    attention = model.config._attn_implementation
    takes = "position_ids" in inspect.signature(model.base_model.forward).parameters
    if not takes or attention not in _ATTENTION_THAT_ENDS:
        raise InputError(
            "this model would look across the sequences of a row",
            where=model.name_or_path or model.config.model_type,
            found=f"attention {attention}" if takes else "a model without positions",
            expected=f"attention {' or '.join(_ATTENTION_THAT_ENDS)}",
            fix="read it one sequence a row, without row_len",
        )
    return {"position_ids": positions_BL}


def _require_known_head(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling"):
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise InputError(
                "this model's head cannot be trained",
                where=model.name_or_path or model.config.model_type,
                found=f"{name} = {value}",
                expected="the head's product as logits, or a soft cap on it",
            )
