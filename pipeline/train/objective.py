"""The loss that a student is trained with, and the check that a cache supports it.

Legend: N rows, K ids kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from capgap.kernels.sparse_kl import ChunkDivergence, Divergence, Tail, check_pair
from capgap.kernels.sparse_kl.divergence import Recording
from capgap.pipeline.store import Batch
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_needs import require_chunks
from capgap.schemas.run_train import TrainSettings

# The least weight of a row: a row for which the teacher is certain still counts a little in the measured loss.
_LEAST_ENTROPY_NATS = 1e-4


@dataclass(frozen=True)
class Objective:
    """The loss of a row, and the weight of each row.

    Attributes:
        divergence: The divergence between teacher and student. With `ratio_clip` it is used only for text that no
            student wrote.
        tail: How the loss treats the teacher's probability outside the kept ids; None uses the recording's default.
        beta: The beta of `jsd`, in (0, 1).
        final_alpha: Weight of the divergence in the last step; None keeps the weight of the first step.
        alpha_schedule: How alpha moves from its first to its final value.
        token_weights: The weights of rows: all equal, or the entropy of the teacher.
        router_loss_weight: Weight of the load-balancing loss of a mixture of experts.
        projected_weight: Weight of the divergence of an aligned cache's projected targets.
        ratio_clip: The clip of the policy gradient, which is the loss for text whose writer's logprobs are known. With
            None the divergence is the loss for such text too.
    """

    divergence: Divergence = "forward_kl"
    tail: Tail | None = None
    beta: float = 0.5
    final_alpha: float | None = None
    alpha_schedule: Literal["linear", "cosine"] = "linear"
    token_weights: Literal["equal", "entropy"] = "equal"
    router_loss_weight: float = 0.0
    projected_weight: float = 0.0
    ratio_clip: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `linear_sparse_kl` that the objective decides."""
        return {"divergence": self.divergence, "tail": self.tail, "beta": self.beta}

    @property
    def of_chunks(self) -> ChunkDivergence:
        """The divergence of chunks: reverse KL if that is the objective's divergence, and forward KL otherwise."""
        return "reverse_kl" if self.divergence == "reverse_kl" else "forward_kl"

    def measured_on(self, recording: Recording) -> Objective:
        """Return the objective for a cache's held-out sequences: this one, or forward KL if they do not support it.

        An arm that learns from text alone or from an online teacher may have a divergence that the cache does not
        support.
        """
        try:
            check_pair(recording, self.divergence, self.tail or _own_tail(recording))
        except ValueError:
            return Objective()
        return self

    def alpha(self, first: float, step: int, num_steps: int) -> float:
        """Return the weight of the divergence in a step.

        Args:
            first: The weight in the first step.
            step: Number of the step, counted from 0. From the last step on the weight is exactly `final_alpha`.
            num_steps: Number of optimizer steps in the whole training.
        """
        if self.final_alpha is None or step == 0:
            return first
        if step >= num_steps - 1:
            return self.final_alpha
        done = step / (num_steps - 1)
        if self.alpha_schedule == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return first + (self.final_alpha - first) * done

    def row_weights(self, batch: Batch) -> torch.Tensor | None:
        """Return the weight of each row [N], float32, before the loss mask is applied; None where all are equal.

        For `entropy` it is the entropy in nats of the teacher's recorded distribution with the tail as one id, which is
        a lower bound of the entropy over the whole vocabulary. Rows of text without targets have equal weights.
        """
        if self.token_weights == "equal" or batch.weights_NK is None:
            return None
        entropy_N: torch.Tensor = torch.special.entr(batch.weights_NK).sum(-1)
        if batch.tail_N is not None:
            entropy_N = entropy_N + torch.special.entr(batch.tail_N.clamp_min(0))
        return entropy_N.clamp_min(_LEAST_ENTROPY_NATS)


def objective_of(settings: TrainSettings, recording: RecordingName, where: Path | str) -> Objective:
    """Return the objective that the settings ask for.

    Args:
        settings: The settings of the training.
        recording: The recording of the cache that the student learns from.
        where: Folder or URL of the cache, for error messages.

    Raises:
        MismatchError: The recording does not support the objective. Its divergence is checked only if the training uses
            the cache's targets.
    """
    objective = Objective(
        "forward_kl" if settings.divergence == "policy_gradient" else settings.divergence,
        settings.tail,
        settings.beta,
        settings.final_alpha,
        settings.alpha_shape,
        settings.token_weights,
        settings.router_loss_weight,
        settings.counted_projected_weight,
        settings.clip if settings.divergence == "policy_gradient" else None,
    )
    if recording == "chunks":
        return _of_chunks(objective, settings, where)
    if settings.counted_projected_weight > 0:
        raise MismatchError(
            "only an aligned cache has projected targets",
            where=where,
            found=f"{recording} targets with train.projected_weight {settings.projected_weight:g}",
            expected="a cache that align made",
            fix="leave train.projected_weight out",
        )
    tail = objective.tail or _own_tail(recording)
    if settings.needs_targets:
        try:
            check_pair(recording, objective.divergence, tail)
        except ValueError as error:
            raise MismatchError(
                "the cache does not support this divergence",
                where=where,
                found=f"{recording} targets with train.divergence {objective.divergence}, train.tail {tail}",
                expected=str(error).partition("expected ")[2],
                fix="change train.divergence or train.tail, or learn from a topk recording",
            ) from None
    if objective.token_weights == "entropy" and recording == "sampled":
        raise MismatchError(
            "the cache does not support these token weights",
            where=where,
            found="sampled targets with train.token_weights entropy",
            # The entropy of n samples is at most log n, and it depends on the same samples that it would weigh.
            expected="a topk recording: a few samples do not give the teacher's entropy",
            fix="leave train.token_weights out, or learn from a topk recording",
        )
    return objective


def _of_chunks(objective: Objective, settings: TrainSettings, where: Path | str) -> Objective:
    try:
        require_chunks("train", settings)
    except ValueError as error:
        raise MismatchError("an aligned cache does not support this setting", where=where, found=error) from None
    return objective


def require_projected(settings: TrainSettings, num_ids: int, where: Path | str) -> None:
    """Raise MismatchError if the settings need projected targets and the aligned cache has none.

    Args:
        settings: The settings of the training.
        num_ids: Number of ids in each projected target of the cache; 0 without projected targets.
        where: Folder or URL of the cache, for error messages.
    """
    if settings.counted_projected_weight > 0 and not num_ids:
        raise MismatchError(
            "the aligned cache has no projected targets",
            where=where,
            found=f"train.projected_weight {settings.projected_weight:g}",
            expected="an aligned cache made with align.projected_top_k above 0",
            fix="set align.projected_top_k, or leave train.projected_weight out",
        )


def _own_tail(recording: Recording) -> Tail:
    return "drop" if recording == "sampled" else "ghost"
