"""What is trained: each recording, each way to treat what it left out, between cross-entropy and the whole teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from capgap.kernels.sparse_kl import Tail

CROSS_ENTROPY, ONLINE = "cross-entropy", "online, whole vocabulary"
NUM_FIRST = 4  # of the arms; the others follow when these are done at every seed
TAILS: tuple[Tail, ...] = ("drop", "renorm", "ghost", "label")


@dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
        name: in the table.
        cache: which of `CACHES` it learns from; every one holds the same sequences.
        recording: of that cache.
        alpha: 0 is cross-entropy alone.
        tail: see `linear_sparse_kl`; None is the recording's own.
        online: the teacher itself in the place of the cache's targets.
        independent: the samples are taken anew, each by itself, instead of all by one offset.
    """

    name: str
    cache: str
    recording: Literal["sampled", "topk"]
    alpha: float = 1.0
    tail: Tail | None = None
    online: bool = False
    independent: bool = False


# One pass of the teacher each; by name, the settings of the cache stage. Where two recordings come from one pass, they
# are stored apart, and their bytes are counted apart.
CACHES: dict[str, dict[str, Any]] = {
    "50": {"recording": "both", "num_samples": 50, "top_k": 50},
    "12": {"recording": "both", "num_samples": 12, "top_k": 12},
    "100": {"recording": "topk", "top_k": 100},
}


def arms() -> list[Arm]:
    """In the order of the table; the goal is about the first ones."""
    found = [
        Arm(CROSS_ENTROPY, "50", "sampled", alpha=0.0),
        Arm(ONLINE, "50", "sampled", online=True),
        Arm("sampled, n = 50, systematic", "50", "sampled"),
        Arm("sampled, n = 50, independent", "50", "sampled", independent=True),
    ]
    found += [Arm(f"top-{k}, {tail}", str(k), "topk", tail=tail) for k in (50, 12, 100) for tail in TAILS]
    return [
        *found,
        Arm("sampled, n = 12, systematic", "12", "sampled"),
        Arm("sampled, n = 12, independent", "12", "sampled", independent=True),
    ]
