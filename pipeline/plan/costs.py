"""Costs in floating-point operations, and which models no other beats at their cost.

Training costs 6 N D and scoring 2 N D, where N is the number of all parameters and D the number of tokens. Only matrix
products are counted: neither attention over the context, nor evaluation, nor the hours of an idle device.
"""

from __future__ import annotations

from collections.abc import Sequence


def training_flops(num_parameters: float, tokens: float) -> float:
    """Return the operations of a training: 6 N D."""
    return 6.0 * num_parameters * tokens


def scoring_flops(num_parameters: float, tokens: float) -> float:
    """Return the operations of a forward pass over the tokens: 2 N D."""
    return 2.0 * num_parameters * tokens


def paper_flops(student: float, tokens: float, teacher: float | None = None) -> float:
    """Return the operations as arXiv 2311.07052 counts them: 6 N_S D + 2 N_T D, or 6 N D without a teacher."""
    return training_flops(student, tokens) + (scoring_flops(teacher, tokens) if teacher else 0.0)


def non_dominated(costs: Sequence[float], losses: Sequence[float]) -> tuple[bool, ...]:
    """Return, for each point of cost and loss, whether no other point beats it.

    One point beats another if neither its cost nor its loss is higher, and at least one of the two is lower.
    """
    points = list(zip(costs, losses, strict=True))
    return tuple(
        not any(c <= cost and loss <= own and (c, loss) != (cost, own) for c, loss in points) for cost, own in points
    )
