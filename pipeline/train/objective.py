"""Which divergence a student is trained by, and whether a cache supports it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.kernels.sparse_kl import Divergence, Recording, Tail, check_pair
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_model import TrainSettings


@dataclass(frozen=True)
class Objective:
    """The divergence, as the loss takes it.

    Attributes:
        divergence: which.
        tail: what becomes of the teacher's probability outside the kept ids; None is what the recording has.
        beta: of `jsd`.
    """

    divergence: Divergence = "forward_kl"
    tail: Tail | None = None
    beta: float = 0.5

    def arguments(self) -> dict[str, Any]:
        """Of `linear_sparse_kl`."""
        return {"divergence": self.divergence, "tail": self.tail, "beta": self.beta}


def objective_of(settings: TrainSettings, recording: Recording, where: Path | str) -> Objective:
    """What the settings ask for.

    Raises:
        MismatchError: the recording does not support it; never where alpha is 0 or the teacher itself is asked.
    """
    objective = Objective(settings.divergence, settings.tail, settings.beta)
    tail: Tail = objective.tail or ("drop" if recording == "sampled" else "ghost")
    if settings.alpha > 0 and not settings.needs_teacher:
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
    return objective
