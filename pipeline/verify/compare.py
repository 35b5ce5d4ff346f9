"""The difference between the targets that a cache keeps and those that a teacher gives now.

Legend: N rows, K kept ids, K' ids kept by the other side, n samples, E pairs of a row and an id, G groups of sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.alignment import EXACT, StoredError
from capgap.schemas.records import BoolArray, ChunkTargets, FloatArray, IntArray, SampledTargets, Targets, TopkTargets

_MOST_GROUPS = 64


@dataclass(frozen=True)
class Apart:
    """The difference between two views of the same rows.

    Attributes:
        max_nats: Largest difference between two logprobs, of kept ids and of labels.
        rms_nats: Root mean square of those differences.
        num_rows: Number of rows that were compared.
        num_other_rows: Number of rows that keep other ids, or other samples.
        moved_samples: Share of all samples that fell on another id; 0 for `topk`.
        common: How similar an id's differences are between sequences, as a correlation. For rounding it is about 0;
            for another teacher the differences are alike in all sequences. NaN for fewer than two sequences, and for
            equal rows.
        common_error: Standard error of `common` where the true correlation is 0.
    """

    max_nats: float
    rms_nats: float
    num_rows: int
    num_other_rows: int
    moved_samples: float = 0.0
    common: float = math.nan
    common_error: float = math.nan


@dataclass(frozen=True)
class _ById:
    """Differences by row and id."""

    rows_E: npt.NDArray[np.int64]
    ids_E: npt.NDArray[np.int64]
    values_E: npt.NDArray[np.float64]


def apart(kept: Targets, live: Targets, num_ids: int, error: StoredError = EXACT) -> Apart:
    """Compare the kept targets with the ones that the teacher gives now, row by row.

    Args:
        kept: Targets as they were read.
        live: Targets of the same rows, scored now with at least as many ids.
        num_ids: Number of samples of a row, or of kept ids.
        error: Errors of the codec. Logprobs below its floor were raised to it in `kept`, and are raised in `live` too.
    """
    assert not isinstance(kept, ChunkTargets) and not isinstance(live, ChunkTargets)
    labels_N = np.abs(kept.label_logprobs_BL - _raised(live.label_logprobs_BL, error)).ravel()
    seq_len = kept.label_logprobs_BL.shape[1]
    if isinstance(kept, SampledTargets):
        assert isinstance(live, SampledTargets)
        moved = _moved_samples(kept, live)
        moved_N = np.bincount(moved.rows_E, weights=np.abs(moved.values_E), minlength=labels_N.size) / 2
        share = float(moved_N.mean()) / num_ids
        return _summed(labels_N, labels_N.size, int((moved_N > 0).sum()), share, *_common(moved, seq_len))
    assert isinstance(live, TopkTargets)
    shape = (labels_N.size, -1)
    steps, other_N, shared = _id_differences(
        kept.ids_BLK.reshape(shape),
        kept.logprobs_BLK.reshape(shape),
        live.ids_BLK.reshape(shape),
        _raised(live.logprobs_BLK, error).reshape(shape),
    )
    differences = np.concatenate([labels_N, steps])
    return _summed(differences, labels_N.size, int(other_N.sum()), 0.0, *_common(_centred(shared), seq_len))


def same_rows(kept: Targets, live: Targets) -> BoolArray:
    """Return which rows are equal [N], for two views as a codec stores them."""
    assert not isinstance(kept, ChunkTargets) and not isinstance(live, ChunkTargets)
    same_N: BoolArray = (kept.label_logprobs_BL == live.label_logprobs_BL).ravel()
    if isinstance(kept, SampledTargets):
        assert isinstance(live, SampledTargets)
        same_N[_moved_samples(kept, live).rows_E] = False
        return same_N
    assert isinstance(live, TopkTargets)
    for name in ("ids_BLK", "logprobs_BLK", "log_tails_BLT", "tail_BL"):
        mine, theirs = (getattr(side, name).reshape(same_N.size, -1) for side in (kept, live))
        same_N &= (mine == theirs).all(axis=1)
    return same_N


def _summed(
    differences: FloatArray, num_rows: int, num_other_rows: int, moved: float, common: float, error: float
) -> Apart:
    rms = math.sqrt(float((differences.astype(np.float64) ** 2).mean()))
    return Apart(float(differences.max()), rms, num_rows, num_other_rows, moved, common, error)


def _raised(logprobs: FloatArray, error: StoredError) -> FloatArray:
    return np.maximum(logprobs, np.float32(error.floor_nats))


def _common(found: _ById, seq_len: int) -> tuple[float, float]:
    """Return the correlation of one id's differences between sequences, and its standard error.

    Let `v_g` be the sum of an id's differences in a group of sequences. The sum of `v_g v_h` over all ids and all pairs
    of groups has the mean 0 if differences are independent between sequences. Its variance is the one under random
    signs of the groups.
    """
    if not len(found.values_E):
        return math.nan, math.nan
    groups_E = found.rows_E // seq_len % _MOST_GROUPS
    ids, place_E = np.unique(found.ids_E, return_inverse=True)
    num_groups = int(groups_E.max()) + 1
    at_E = groups_E * len(ids) + place_E
    shape = (num_groups, len(ids))
    sums = np.bincount(at_E, weights=found.values_E, minlength=num_groups * len(ids)).reshape(shape)
    counts = np.bincount(at_E, minlength=num_groups * len(ids)).reshape(shape).astype(np.float64)
    products, pairs = sums @ sums.T, counts @ counts.T
    for square in (products, pairs):
        np.fill_diagonal(square, 0)
    scale = float((found.values_E**2).mean()) * float(pairs.sum())
    if scale == 0:
        return math.nan, math.nan
    return float(products.sum()) / scale, math.sqrt(2 * float((products**2).sum())) / scale


def _centred(found: _ById) -> _ById:
    """Return the differences without each row's mean, which the normalization spreads over all ids of a row."""
    if not len(found.rows_E):
        return found
    sums, counts = np.bincount(found.rows_E, weights=found.values_E), np.bincount(found.rows_E)
    means = sums / np.maximum(counts, 1)
    return _ById(found.rows_E, found.ids_E, found.values_E - means[found.rows_E])


def _id_differences(
    ids_NK: IntArray, logprobs_NK: FloatArray, live_ids_NK: IntArray, live_NK: FloatArray
) -> tuple[FloatArray, BoolArray, _ById]:
    """Return the differences of ids that both keep, and for an id of one side its height above the other's last id.

    Two ids of about equal probability may change places at the end of a row, which adds almost nothing here.

    Returns:
        The absolute differences, which rows keep other ids, and the signed differences of ids that both keep.
    """
    is_kept_NK = ~np.isneginf(logprobs_NK)
    # of a row that holds fewer ids, only as many of the live ids are compared
    num_kept_N = is_kept_NK.sum(axis=1)
    is_live_NK = np.arange(live_ids_NK.shape[1])[None] < num_kept_N[:, None]
    rows = np.arange(len(ids_NK))
    last_N = logprobs_NK[rows, num_kept_N - 1]
    live_last_N = live_NK[rows, np.minimum(num_kept_N, live_NK.shape[1]) - 1]
    found: list[FloatArray] = []
    shared: list[tuple[npt.NDArray[np.int64], IntArray, FloatArray]] = []
    other_N = np.zeros(len(ids_NK), np.bool_)
    # a thousand rows at a time, because comparing all ids with all takes K x K values a row
    for start in range(0, len(ids_NK), 1024):
        part = slice(start, start + 1024)
        same_nKK = ids_NK[part, :, None] == live_ids_NK[part, None, :]
        same_nKK &= is_kept_NK[part, :, None] & is_live_NK[part, None, :]
        row, mine, theirs = np.nonzero(same_nKK)
        steps = logprobs_NK[part][row, mine] - live_NK[part][row, theirs]
        shared.append((row + start, ids_NK[part][row, mine], steps))
        found.append(np.abs(steps))
        only_nK = is_kept_NK[part] & ~same_nKK.any(axis=2)
        live_only_nK = is_live_NK[part] & ~same_nKK.any(axis=1)
        found.append(np.maximum(logprobs_NK[part] - live_last_N[part, None], 0)[only_nK])
        found.append(np.maximum(live_NK[part] - last_N[part, None], 0)[live_only_nK])
        other_N[part] = only_nK.any(axis=1) | live_only_nK.any(axis=1)
    rows_E, ids_E, values_E = (np.concatenate(parts) for parts in zip(*shared, strict=True))
    return np.concatenate(found), other_N, _ById(rows_E, ids_E.astype(np.int64), values_E.astype(np.float64))


def _moved_samples(kept: SampledTargets, live: SampledTargets) -> _ById:
    """Return, for each id with different counts, how many more samples `kept` has than `live`."""
    num_rows = kept.num_ids_BL.size
    row = np.concatenate([np.repeat(np.arange(num_rows), t.num_ids_BL.ravel()) for t in (kept, live)])
    ids = np.concatenate([kept.ids_D, live.ids_D]).astype(np.int64)
    counts = np.concatenate([kept.counts_D, -live.counts_D]).astype(np.float64)
    keys, place = np.unique(row << 32 | ids, return_inverse=True)
    difference = np.bincount(place, weights=counts)
    moved = difference != 0
    return _ById(keys[moved] >> 32, keys[moved] & 0xFFFFFFFF, difference[moved])
