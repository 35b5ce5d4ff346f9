"""What is trained: each recording, each way to treat what it left out, between cross-entropy and the whole teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from capgap.kernels.sparse_kl import Tail

CROSS_ENTROPY, ONLINE = "cross-entropy", "online, whole vocabulary"
NUM_FIRST = 6  # of the arms: what the goal is about
TAILS: tuple[Tail, ...] = ("drop", "renorm", "ghost", "label")
TOP_KS = (12, 50, 64, 100)


@dataclass(frozen=True)
class Run:
    """Models and text of a table.

    Attributes:
        file: whose corpus, teacher, student and training are taken.
        num_tokens: of every training: one pass over the first shards of the cache.
        changes: by section of the file, what is otherwise here.
        few: only the arms that tell whether distillation lowers the loss on the text, and other programs' losses.
    """

    file: str
    num_tokens: int
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    few: bool = False


# There are a hundred trainings here where the run file has three: what makes each shorter, for all alike.
_SHORTER: dict[str, dict[str, Any]] = {
    "cache": {"dtype": "bfloat16"},
    "train": {"precision": "bf16-mixed", "compile": True, "num_validation_sequences": 1},
    "eval": {"num_sequences": 32, "num_full_sequences": 32},
}
# In float32 throughout: a table of its own, which a processor without products in 16 bits makes too.
_ADAPTED: dict[str, dict[str, Any]] = {
    "teacher": {
        "adapt": {"learning_rate": 1e-4, "batch_sequences": 4, "max_tokens": 102_400, "compile": True},
    },
    "train": {"compile": True, "num_validation_sequences": 1},
    "eval": _SHORTER["eval"],
}
RUNS = {
    "demo": Run("demo", 524_288),
    "smol": Run("smol", 102_400, _SHORTER),
    "smol-adapted": Run("smol", 102_400, _ADAPTED, few=True),
}


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
    "6": {"recording": "sampled", "num_samples": 6},
    "12": {"recording": "both", "num_samples": 12, "top_k": 12},
    "25": {"recording": "both", "num_samples": 25, "top_k": 64},
    "50": {"recording": "both", "num_samples": 50, "top_k": 50},
    "100": {"recording": "both", "num_samples": 100, "top_k": 100},
    "64 compact": {"recording": "topk", "top_k": 64, "profile": "compact"},
    "64 small": {"recording": "topk", "top_k": 64, "profile": "small"},
}
# Of what each number of top-k tokens is kept with.
_CACHE_OF = {12: "12", 50: "50", 64: "25", 100: "100"}


def arms(few: bool = False) -> list[Arm]:
    """In the order of the table; the goal is about the first ones.

    Args:
        few: only cross-entropy, online and 50 samples, at every alpha, and the losses that other programs have.
    """
    if few:
        beside = [_sampled(50), *(_topk(50, tail) for tail in ("ghost", "renorm"))]
        return [arm for arm in arms() if arm.online or arm.alpha < 1 or arm in beside]
    return [
        Arm(CROSS_ENTROPY, "50", "sampled", alpha=0.0),
        Arm(ONLINE, "50", "sampled", online=True),
        *(_sampled(n) for n in (50, 25, 12)),
        _topk(64, "ghost"),
        *(_sampled(n) for n in (6, 100)),
        *(Arm(f"sampled, n = {n}, independent", str(n), "sampled", independent=True) for n in (50, 12)),
        *(_topk(k, tail) for k in TOP_KS for tail in TAILS if (k, tail) != (64, "ghost")),
        *(Arm(f"top-64, ghost, {name}", f"64 {name}", "topk", tail="ghost") for name in ("compact", "small")),
        *(Arm(f"sampled, n = 50, alpha {alpha}", "50", "sampled", alpha=alpha) for alpha in (0.9, 0.5)),
        *(Arm(f"online, alpha {alpha}", "50", "sampled", alpha=alpha, online=True) for alpha in (0.9, 0.5)),
    ]


def _sampled(num_samples: int) -> Arm:
    return Arm(f"sampled, n = {num_samples}, systematic", str(num_samples), "sampled")


def _topk(top_k: int, tail: Tail) -> Arm:
    return Arm(f"top-{top_k}, {tail}", _CACHE_OF[top_k], "topk", tail=tail)
