"""Which loss a student is trained by, and whether a cache supports it.

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

# A row of which the teacher is certain still has a loss to be measured, though next to none to learn from.
_LEAST_ENTROPY_NATS = 1e-4


@dataclass(frozen=True)
class Objective:
    """The loss of a row, and what each row counts.

    Attributes:
        divergence: which; with `ratio_clip` that of text which no student wrote.
        tail: what becomes of the teacher's probability outside the kept ids; None is what the recording has.
        beta: of `jsd`.
        final_alpha: weight of the divergence in the last step; None is that of the first.
        alpha_schedule: how it gets there.
        token_weights: what a row counts.
        router_loss_weight: of the load-balancing loss of a mixture of experts.
        projected_weight: of the divergence of an aligned cache's projected targets.
        ratio_clip: text of which the writer's logprobs are known is learnt by a policy gradient with this clip; None
            learns it by the divergence as well.
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
        """The arguments of `linear_sparse_kl` that the objective decides."""
        return {"divergence": self.divergence, "tail": self.tail, "beta": self.beta}

    @property
    def of_chunks(self) -> ChunkDivergence:
        """The divergence of chunks; those that have another one are measured by forward KL."""
        return "reverse_kl" if self.divergence == "reverse_kl" else "forward_kl"

    def measured_on(self, recording: Recording) -> Objective:
        """The objective that measures a cache's held-out sequences: this one, or forward KL if they do not support it.

        An arm that learns from the text alone, or from the teacher itself, may ask for what the cache does not support.
        """
        try:
            check_pair(recording, self.divergence, self.tail or _own_tail(recording))
        except ValueError:
            return Objective()
        return self

    def alpha(self, first: float, step: int, num_steps: int) -> float:
        """Weight of the divergence in a step, counted from 0; from the last step on it is `final_alpha`, exactly."""
        if self.final_alpha is None or step == 0:
            return first
        if step >= num_steps - 1:
            return self.final_alpha
        done = step / (num_steps - 1)
        if self.alpha_schedule == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return first + (self.final_alpha - first) * done

    def row_weights(self, batch: Batch) -> torch.Tensor | None:
        """What each row counts [N], float32, beside its label's mask; None where all count the same.

        `entropy` is that of the teacher's recorded distribution, with the tail as one id: a lower bound of the whole.
        Text without targets has none, and its rows count the same.
        """
        if self.token_weights == "equal" or batch.weights_NK is None:
            return None
        entropy_N: torch.Tensor = torch.special.entr(batch.weights_NK).sum(-1)
        if batch.tail_N is not None:
            entropy_N = entropy_N + torch.special.entr(batch.tail_N.clamp_min(0))
        return entropy_N.clamp_min(_LEAST_ENTROPY_NATS)


def objective_of(settings: TrainSettings, recording: RecordingName, where: Path | str) -> Objective:
    """What the settings ask for.

    Raises:
        MismatchError: the recording does not support it; the divergence is not looked at where the cache's targets do
            not count.
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
            # the entropy of n samples is not above log n, and it varies with the very samples that it would weigh
            expected="a topk recording: a few samples do not give the teacher's entropy",
            fix="leave train.token_weights out, or learn from a topk recording",
        )
    return objective


def _of_chunks(objective: Objective, settings: TrainSettings, where: Path | str) -> Objective:
    try:
        require_chunks("train", settings)
    except ValueError as error:
        raise MismatchError("an aligned cache does not support this", where=where, found=error) from None
    return objective


def require_projected(settings: TrainSettings, num_ids: int, where: Path | str) -> None:
    """Raise MismatchError where projected targets are asked for and the aligned cache, of `num_ids`, has none."""
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
