"""Scored sequences into the records of a shard.

Legend: B sequences, L targets, K ids kept, n draws, D distinct ids of the block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from capgap.pipeline.cache.scoring import Scored
from capgap.schemas.records import SampledTargets, Targets, TopkTargets


def to_targets(scored: Sequence[Scored]) -> Targets:
    """The targets of one block."""
    label_logprobs_BL = np.stack([s.label_logprobs_L for s in scored])
    ids_BLK = np.stack([s.ids_LK for s in scored])
    if scored[0].logprobs_LK is None:
        return _count(ids_BLK, label_logprobs_BL)
    return TopkTargets(
        ids_BLK,
        np.stack([s.logprobs_LK for s in scored if s.logprobs_LK is not None]),
        np.stack([s.tail_L for s in scored if s.tail_L is not None]),
        label_logprobs_BL,
    )


def _count(draws_BLn: np.ndarray, label_logprobs_BL: np.ndarray) -> SampledTargets:
    """Run lengths of each row's ascending draws."""
    num_draws = draws_BLn.shape[2]
    draws_Nn = draws_BLn.reshape(-1, num_draws)
    first_Nn = np.ones(draws_Nn.shape, dtype=np.bool_)
    first_Nn[:, 1:] = draws_Nn[:, 1:] != draws_Nn[:, :-1]
    starts_D = np.flatnonzero(first_Nn)
    counts_D = np.diff(starts_D, append=draws_Nn.size)
    return SampledTargets(
        first_Nn.sum(axis=1, dtype=np.int32).reshape(label_logprobs_BL.shape),
        draws_Nn.ravel()[starts_D].astype(np.int32),
        counts_D.astype(np.int32),
        label_logprobs_BL,
    )
