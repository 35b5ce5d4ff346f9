"""The part of `law.json` about cost: compute and loss of every combination of settings in a grid."""

from __future__ import annotations

from typing import Literal

from capgap.schemas.base import Record

Accounting = Literal["paper", "shared", "everything"]


class FrontierPoint(Record):
    """Compute and loss of one combination of settings."""

    name: str
    """Student, teacher, budget, alpha and init."""

    flops: float
    """Number of floating-point operations, counted by the frontier's accounting."""

    loss: float
    """Mean loss over all seeds, in nats/token."""

    num_seeds: int
    """Number of seeds in that mean."""

    supervised: bool
    """Whether the student was trained without a teacher."""

    on_frontier: bool
    """Whether no other point is better at the same or lower cost, or as good at lower cost."""


class Frontier(Record):
    """Quality as a function of compute, under one way of counting compute."""

    accounting: Accounting
    """Name of the way of counting."""

    stated: str
    """What is counted, in words."""

    points: tuple[FrontierPoint, ...]
    """The points by cost."""

    left_out: tuple[str, ...]
    """Combinations of settings without a point, each with the reason."""
