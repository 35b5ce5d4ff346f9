"""The part of `law.json` about cost: every setting of a grid at its compute and its loss."""

from __future__ import annotations

from typing import Literal

from capgap.schemas.base import Record

Accounting = Literal["paper", "shared", "everything"]


class FrontierPoint(Record):
    """One setting of the grid at its cost."""

    name: str
    """Student, teacher, budget, alpha, init."""

    flops: float
    """Floating-point operations under the accounting."""

    loss: float
    """Mean over all seeds of its student, nats/token."""

    num_seeds: int
    """Behind it."""

    supervised: bool
    """Without a teacher."""

    on_frontier: bool
    """No other point costs as little or less and is better, or is as good and costs less."""


class Frontier(Record):
    """Compute against quality."""

    accounting: Accounting
    """Its name."""

    stated: str
    """What is counted."""

    points: tuple[FrontierPoint, ...]
    """By cost."""

    left_out: tuple[str, ...]
    """Settings without a point, each with the reason."""
