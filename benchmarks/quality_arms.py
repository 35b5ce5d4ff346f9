"""The arms of benchmarks/quality.py: each recording and each treatment of its tail, cross-entropy, and online."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from capgap.kernels.sparse_kl import Tail

CROSS_ENTROPY, ONLINE = "cross-entropy", "online, whole vocabulary"
NUM_FIRST = 6  # number of the first arms, which the project's goal compares
TAILS: tuple[Tail, ...] = ("drop", "renorm", "ghost", "label")
TOP_KS = (12, 50, 64, 100)


@dataclass(frozen=True)
class Run:
    """Models and text of a table.

    Attributes:
        file: Name of the run file whose corpus, teacher, student and training are used.
        num_tokens: Number of tokens of every training, which is one pass over the first shards of the cache.
        changes: Settings that differ from the file, by section.
        few: Whether to train only the arms of `arms(few=True)`.
    """

    file: str
    num_tokens: int
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    few: bool = False


# Changes that make every training shorter: the run file is meant for three trainings, and here are a hundred.
_SHORTER: dict[str, dict[str, Any]] = {
    "cache": {"dtype": "bfloat16"},
    "train": {"precision": "bf16-mixed", "compile": True, "num_validation_sequences": 1},
    "eval": {"num_sequences": 32, "num_full_sequences": 32},
}
# Everything is float32, so that a processor without 16-bit products can make this table too.
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
        name: Name in the table.
        cache: Name of the cache in `CACHES` that it learns from; all caches hold the same sequences.
        recording: Recording of that cache.
        alpha: Weight of the teacher in the loss; 0 is cross-entropy alone.
        tail: How the tail is treated (the argument of `linear_sparse_kl`); None for the recording's default.
        online: Whether the teacher itself is asked instead of the cache's targets.
        independent: Whether the samples are drawn independently, instead of systematically from one offset.
    """

    name: str
    cache: str
    recording: Literal["sampled", "topk"]
    alpha: float = 1.0
    tail: Tail | None = None
    online: bool = False
    independent: bool = False


# Settings of the cache stage, by name; each cache is one pass of the teacher. Two recordings of one pass are stored and
# counted separately.
CACHES: dict[str, dict[str, Any]] = {
    "6": {"recording": "sampled", "num_samples": 6},
    "12": {"recording": "both", "num_samples": 12, "top_k": 12},
    "25": {"recording": "both", "num_samples": 25, "top_k": 64},
    "50": {"recording": "both", "num_samples": 50, "top_k": 50},
    "100": {"recording": "both", "num_samples": 100, "top_k": 100},
    "64 compact": {"recording": "topk", "top_k": 64, "profile": "compact"},
    "64 small": {"recording": "topk", "top_k": 64, "profile": "small"},
}
# The cache that holds each number of top-k tokens.
_CACHE_OF = {12: "12", 50: "50", 64: "25", 100: "100"}


def arms(few: bool = False) -> list[Arm]:
    """Return the arms in the order of the table; the project's goal compares the first `NUM_FIRST` of them.

    Args:
        few: Only return cross-entropy, online and 50 samples at every alpha, and the losses of other programs.
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
