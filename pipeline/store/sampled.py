"""The stored values of `sampled` targets.

The ids of a row are sorted by falling count, and ids of equal count by rising rank. Most ids are sampled once. Their
counts are not stored, because the number of such ids follows from the number of samples and the other counts.

    repeated, counts     ranks and counts of the ids sampled at least twice; `num_repeated` of them in each row
    once                 ranks of the ids sampled once: the first rank of each row, then differences

Legend: B sequences, L targets a sequence, N = B x L rows, n samples a row, D ids of all rows, R ids sampled at least
twice, O ids sampled once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.checks import check_counts, check_distinct, check_ids, check_logprobs
from capgap.pipeline.store.layout import RaggedValues
from capgap.pipeline.store.planes import cumulate_runs, sums_before
from capgap.pipeline.store.quantise import LogUniform
from capgap.pipeline.store.ranking import Ranking
from capgap.schemas.records import SampledTargets

LABELS = LogUniform()

_RANK_BITS = 24
_COUNT_BITS = 16


def sampled_values(
    targets: SampledTargets, ranking: Ranking, num_samples: int
) -> dict[str, npt.NDArray[Any] | RaggedValues]:
    """Return the values of one member's targets, by field.

    Raises:
        InputError: An id is outside the vocabulary or twice in a row, a value is NaN, or counts do not sum to the
            number of samples.
    """
    num_ids_N = targets.num_ids_BL.ravel()
    check_ids("ids", targets.ids_D, len(ranking.ids_V))
    check_logprobs("label_logprobs_BL", targets.label_logprobs_BL)
    check_counts(num_ids_N, targets.ids_D, targets.counts_D, num_samples)
    check_distinct("ids", _padded(targets.ids_D, num_ids_N))
    ranks_D, counts_D = _sorted(targets, ranking)
    row_D = np.repeat(np.arange(len(num_ids_N)), num_ids_N)
    repeated_D = counts_D > 1
    num_repeated_BL = np.bincount(row_D[repeated_D], minlength=len(num_ids_N)).reshape(targets.num_ids_BL.shape)
    repeated_B = num_repeated_BL.sum(axis=1)
    once_B = targets.num_ids_BL.sum(axis=1) - repeated_B
    ranks_O, row_O = ranks_D[~repeated_D], row_D[~repeated_D]
    return {
        "num_repeated": num_repeated_BL,
        "counts": RaggedValues(counts_D[repeated_D], repeated_B),
        "repeated": RaggedValues(ranks_D[repeated_D], repeated_B),
        "once": RaggedValues(_differences(ranks_O, row_O), once_B),
        "label": LABELS.encode(targets.label_logprobs_BL),
    }


def sampled_targets(values: Mapping[str, npt.NDArray[Any]], ranking: Ranking, num_samples: int) -> SampledTargets:
    """Build the targets of one member from its values by field.

    Raises:
        ValueError, InputError: The values contradict one another.
    """
    num_repeated_N = values["num_repeated"].ravel().astype(np.int32)
    counts_R = values["counts"].astype(np.int32)
    ranks_R, steps_O = values["repeated"], values["once"]
    num_once_N = _num_once(num_repeated_N, counts_R, num_samples)
    if num_once_N.sum() != len(steps_O) or len(counts_R) != len(ranks_R):
        raise ValueError(f"{len(steps_O)} ids sampled once, expected {num_once_N.sum()}")
    ranks_O = cumulate_runs(steps_O, num_once_N)
    check_ids("ids", ranks_R, len(ranking.ids_V))
    check_ids("ids", ranks_O, len(ranking.ids_V))
    # in each row, the ids that were sampled once come last
    place_R = np.arange(len(ranks_R)) + np.repeat(sums_before(num_once_N), num_repeated_N)
    is_once_D = np.ones(len(ranks_R) + len(ranks_O), np.bool_)
    is_once_D[place_R] = False
    ids_D = np.empty(len(is_once_D), np.int32)
    ids_D[place_R] = ranking.ids_V[ranks_R]
    ids_D[is_once_D] = ranking.ids_V[ranks_O]
    counts_D = np.ones(len(is_once_D), np.int32)
    counts_D[place_R] = counts_R
    num_ids_BL = (num_repeated_N + num_once_N).astype(np.int32).reshape(values["label"].shape)
    return SampledTargets(num_ids_BL, ids_D, counts_D, LABELS.decode(values["label"]))


def _padded(ids_D: npt.NDArray[Any], num_ids_N: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return the ids of each row, and behind them negative numbers that differ within a row [N, widest]."""
    place_K = np.arange(num_ids_N.max(initial=0), dtype=np.int32)
    ids_NK = np.tile(-1 - place_K, (len(num_ids_N), 1))
    ids_NK[place_K < num_ids_N[:, None]] = ids_D
    return ids_NK


def _sorted(targets: SampledTargets, ranking: Ranking) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Return ranks and counts [D], sorted in each row by falling count and rising rank.

    Row, count and rank are packed into one integer, because one sort of integers takes only 4 ns each.
    """
    row_D = np.repeat(np.arange(targets.num_ids_BL.size, dtype=np.uint64), targets.num_ids_BL.ravel())
    most = (1 << _COUNT_BITS) - 1
    key_D = row_D << np.uint64(_COUNT_BITS) | (most - targets.counts_D).astype(np.uint64)
    key_D = key_D << np.uint64(_RANK_BITS) | ranking.ranks_V[targets.ids_D].astype(np.uint64)
    key_D.sort()
    ranks_D = (key_D & np.uint64((1 << _RANK_BITS) - 1)).astype(np.uint32)
    counts_D = most - (key_D >> np.uint64(_RANK_BITS) & np.uint64(most)).astype(np.int64)
    return ranks_D, counts_D


def _differences(ranks_O: npt.NDArray[np.uint32], row_O: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    steps_O = ranks_O.copy()
    same_row = row_O[1:] == row_O[:-1]
    steps_O[1:][same_row] -= ranks_O[:-1][same_row]
    return steps_O


def _num_once(
    num_repeated_N: npt.NDArray[np.int32], counts_R: npt.NDArray[np.int32], num_samples: int
) -> npt.NDArray[np.int64]:
    if num_repeated_N.sum() != len(counts_R) or (len(counts_R) and counts_R.min() < 2):
        raise ValueError(f"{len(counts_R)} counts, expected {num_repeated_N.sum()} of at least 2")
    ends_R = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts_R, dtype=np.int64)])
    first_N = sums_before(num_repeated_N)
    num_once_N: npt.NDArray[Any] = num_samples - (ends_R[first_N + num_repeated_N] - ends_R[first_N])
    if len(num_once_N) and num_once_N.min() < 0:
        raise ValueError(f"more than {num_samples} samples in a row")
    return num_once_N
