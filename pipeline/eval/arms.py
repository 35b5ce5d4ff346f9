"""Paired differences between arms, in held-out loss or nearness to the teacher, at each seed and over all seeds.

Legend: S sequences, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from capgap.pipeline.eval.intervals import (
    Float64Array,
    Int64Array,
    bootstrap_interval,
    t_interval,
)
from capgap.schemas.results import PairedDifference, Quantity, SeedsDifference

Losses = Mapping[str, Mapping[int, Float64Array]]
"""For every student, by arm and seed: nats summed over the labels of each sequence, float64 [S]."""


def paired_differences(
    losses: Losses, labels_S: Int64Array, weights_RS: Int64Array, quantity: Quantity = "loss"
) -> tuple[PairedDifference, ...]:
    """Return the difference of every two arms at every seed that both have, with an interval over sequences.

    Args:
        losses: The quantity of every student, summed over the labels of each sequence.
        labels_S: Number of labels of each sequence [S].
        weights_RS: Weights of the bootstrap's resamples [R, S].
        quantity: Name of the quantity.
    """
    return tuple(
        _paired(first, second, seed, losses[first][seed] - losses[second][seed], labels_S, weights_RS, quantity)
        for first, second in combinations(losses, 2)
        for seed in losses[first]
        if seed in losses[second]
    )


def differences_over_seeds(paired: tuple[PairedDifference, ...]) -> tuple[SeedsDifference, ...]:
    """Return the mean difference of every two arms that share at least two seeds, with an interval over seeds."""
    by_arms: dict[tuple[str, str, Quantity], list[PairedDifference]] = {}
    for difference in paired:
        by_arms.setdefault((difference.first, difference.second, difference.quantity), []).append(difference)
    return tuple(_over_seeds(*arms, found) for arms, found in by_arms.items() if len(found) > 1)


def _paired(
    first: str,
    second: str,
    seed: int,
    nats_S: Float64Array,
    labels_S: Int64Array,
    weights_RS: Int64Array,
    quantity: Quantity,
) -> PairedDifference:
    return PairedDifference(
        first=first,
        second=second,
        seed=seed,
        difference=float(np.sum(nats_S) / np.sum(labels_S)),
        interval=bootstrap_interval(nats_S, labels_S, weights_RS),
        quantity=quantity,
    )


def _over_seeds(first: str, second: str, quantity: Quantity, found: list[PairedDifference]) -> SeedsDifference:
    mean, interval = t_interval([one.difference for one in found])
    seeds = tuple(one.seed for one in found)
    return SeedsDifference(
        first=first, second=second, seeds=seeds, difference=mean, interval=interval, quantity=quantity
    )
