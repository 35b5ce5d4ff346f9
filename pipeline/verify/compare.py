"""How far what is kept of some rows lies from what a teacher gives for them now.

Legend: N rows, K ids kept, K' ids kept by the other side, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.alignment import EXACT, StoredError
from capgap.schemas.records import BoolArray, FloatArray, IntArray, SampledTargets, Targets, TopkTargets


@dataclass(frozen=True)
class Apart:
    """Two views of the same rows.

    Attributes:
        max_nats: largest difference of two logprobs, of kept ids and of labels.
        mean_nats: mean of those differences.
        num_rows: rows that were compared.
        num_other_rows: rows that keep other ids, or samples.
        moved_samples: share of all samples that fell on another id; 0 for `topk`.
    """

    max_nats: float
    mean_nats: float
    num_rows: int
    num_other_rows: int
    moved_samples: float = 0.0


def apart(kept: Targets, live: Targets, num_ids: int, error: StoredError = EXACT) -> Apart:
    """Compare what was kept with what the teacher gives now, row by row.

    Args:
        kept: rows as they were read.
        live: the same rows, scored now with at least as many ids.
        num_ids: samples a row, or ids kept.
        error: of the codec; logprobs below its floor were raised to it, and are here too.
    """
    labels_N = np.abs(kept.label_logprobs_BL - _raised(live.label_logprobs_BL, error)).ravel()
    if isinstance(kept, SampledTargets):
        assert isinstance(live, SampledTargets)
        moved_N = _moved_samples(kept, live)
        other = int((moved_N > 0).sum())
        return _summed(labels_N, len(moved_N), other, float(moved_N.mean()) / num_ids)
    assert isinstance(live, TopkTargets)
    shape = (labels_N.size, -1)
    steps, other_N = _id_differences(
        kept.ids_BLK.reshape(shape),
        kept.logprobs_BLK.reshape(shape),
        live.ids_BLK.reshape(shape),
        _raised(live.logprobs_BLK, error).reshape(shape),
    )
    return _summed(np.concatenate([labels_N, steps]), labels_N.size, int(other_N.sum()))


def _summed(differences: FloatArray, num_rows: int, num_other_rows: int, moved_samples: float = 0.0) -> Apart:
    mean = float(differences.mean(dtype=np.float64))
    return Apart(float(differences.max()), mean, num_rows, num_other_rows, moved_samples)


def _raised(logprobs: FloatArray, error: StoredError) -> FloatArray:
    return np.maximum(logprobs, np.float32(error.floor_nats))


def _id_differences(
    ids_NK: IntArray, logprobs_NK: FloatArray, live_ids_NK: IntArray, live_NK: FloatArray
) -> tuple[FloatArray, BoolArray]:
    """Differences of ids that both keep; of an id that one side keeps, how far it lies above the other's last.

    Two ids about as probable as one another may change places at the end of a row: that costs next to nothing here.
    """
    is_kept_NK = ~np.isneginf(logprobs_NK)
    # of a row that holds fewer ids, only as many of the live ones stand against it
    num_kept_N = is_kept_NK.sum(axis=1)
    is_live_NK = np.arange(live_ids_NK.shape[1])[None] < num_kept_N[:, None]
    rows = np.arange(len(ids_NK))
    last_N = logprobs_NK[rows, num_kept_N - 1]
    live_last_N = live_NK[rows, np.minimum(num_kept_N, live_NK.shape[1]) - 1]
    found: list[FloatArray] = []
    other_N = np.zeros(len(ids_NK), np.bool_)
    # a thousand rows at a time: the comparison of all ids with all is K x K a row
    for start in range(0, len(ids_NK), 1024):
        part = slice(start, start + 1024)
        same_nKK = ids_NK[part, :, None] == live_ids_NK[part, None, :]
        same_nKK &= is_kept_NK[part, :, None] & is_live_NK[part, None, :]
        row, mine, theirs = np.nonzero(same_nKK)
        found.append(np.abs(logprobs_NK[part][row, mine] - live_NK[part][row, theirs]))
        only_nK = is_kept_NK[part] & ~same_nKK.any(axis=2)
        live_only_nK = is_live_NK[part] & ~same_nKK.any(axis=1)
        found.append(np.maximum(logprobs_NK[part] - live_last_N[part, None], 0)[only_nK])
        found.append(np.maximum(live_NK[part] - last_N[part, None], 0)[live_only_nK])
        other_N[part] = only_nK.any(axis=1) | live_only_nK.any(axis=1)
    return np.concatenate(found), other_N


def _moved_samples(kept: SampledTargets, live: SampledTargets) -> npt.NDArray[np.float64]:
    """Samples of each row that fell on another id."""
    num_rows = kept.num_ids_BL.size
    row = np.concatenate([np.repeat(np.arange(num_rows), t.num_ids_BL.ravel()) for t in (kept, live)])
    ids = np.concatenate([kept.ids_D, live.ids_D]).astype(np.int64)
    counts = np.concatenate([kept.counts_D, -live.counts_D]).astype(np.float64)
    _, place = np.unique(row << 32 | ids, return_inverse=True)
    difference = np.abs(np.bincount(place, weights=counts))
    first = np.zeros(len(difference), np.int64)
    first[place] = row
    return np.bincount(first, weights=difference, minlength=num_rows) / 2
