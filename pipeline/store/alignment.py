"""The check that target i belongs to the token at i + 1, so that no off-by-one is stored or loaded unnoticed.

Every row carries the teacher's logprob of the real next token, taken from the logits themselves. The kept
distribution must agree with it:

- `topk`: where the next token is among the kept ids, its kept logprob is that logprob; where it is not, its
  probability is at most that of the last kept id, or unknown (NaN) in a codec that allows unknown logprobs.
- `sampled`: systematic sampling gives every id the floor or the ceiling of n p samples, so the next token's count lies
  within one of n exp(logprob).

The tokens of `chunks` targets are not the teacher's. There, every target of a kept chunk must be a label. Where a
projected target contains that label among its ids, the label's logprob must equal the chunk's logprob.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.chunks import chunks_without_labels, padded_rows
from capgap.schemas.errors import CorruptError
from capgap.schemas.records import ChunkTargets, SampledTargets, Sequences, Targets, TopkTargets

# Both places were written from the same float32 logprob, so apart from the codec's own error only rounding differs.
LOGPROB_TOLERANCE_NATS = 1e-4
# n p is rounded in float32, and sampling adds up its cumulative sums in another order. A hundredth of a sample covers
# both effects.
COUNT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class StoredError:
    """The largest difference, in nats, between a logprob as it was written and as it is read back.

    Attributes:
        label_nats: Largest error of the next token's logprob.
        kept_nats: Largest error of a kept id's logprob that is above `floor_nats`.
        floor_nats: The codec raises lower logprobs of kept ids to this value.
    """

    label_nats: float = 0.0
    kept_nats: float = 0.0
    floor_nats: float = -np.inf


EXACT = StoredError()


def check_alignment(
    sequences: Sequences, targets: Targets, num_samples: int, where: str, error: StoredError = EXACT
) -> None:
    """Raise CorruptError, naming the first such row, if a target contradicts the token that follows it.

    Args:
        sequences: Sequences of the block.
        targets: Their targets.
        num_samples: Number of samples a row; used for `sampled` targets only.
        where: Name of the block in the error.
        error: The codec's error, by which the tolerance of the check is widened.
    """
    labels_BL = sequences.tokens_BL1[:, 1:]
    if isinstance(targets, ChunkTargets):
        bad_BL = chunks_without_labels(sequences.mask_BL1, targets) | _contradictions_projected(
            labels_BL, targets, error
        )
    elif isinstance(targets, SampledTargets):
        bad_BL = _contradictions_sampled(labels_BL, targets, num_samples, error)
    else:
        bad_BL = _contradictions_topk(labels_BL, targets, error)
    if bad_BL.any():
        sequence, position = (int(i) for i in np.argwhere(bad_BL)[0])
        raise CorruptError(
            "targets are not aligned with their tokens",
            where=f"{where}, sequence {sequence}, target {position}",
            found=f"{int(bad_BL.sum())} of {bad_BL.size} targets that contradict the logprob of the next token",
            expected="none",
            fix="make the shard again with `capgap cache`",
        )


def _contradictions_sampled(
    labels_BL: npt.NDArray[np.int32], targets: SampledTargets, num_samples: int, error: StoredError
) -> npt.NDArray[np.bool_]:
    num_rows = labels_BL.size
    row_D = np.repeat(np.arange(num_rows), targets.num_ids_BL.ravel())
    is_label_D = targets.ids_D == labels_BL.ravel()[row_D]
    count_N = np.bincount(row_D[is_label_D], weights=targets.counts_D[is_label_D], minlength=num_rows)
    expected_N = num_samples * np.exp(targets.label_logprobs_BL.ravel().astype(np.float64))
    tolerance_N = 1 + COUNT_TOLERANCE + expected_N * np.expm1(error.label_nats)
    bad: npt.NDArray[np.bool_] = np.abs(count_N - expected_N) >= tolerance_N
    return bad.reshape(labels_BL.shape)


def _contradictions_projected(
    labels_BL: npt.NDArray[np.int32], targets: ChunkTargets, error: StoredError
) -> npt.NDArray[np.bool_]:
    if targets.projected is None:
        return np.zeros(labels_BL.shape, np.bool_)
    ids_NK, logprobs_NK, _ = padded_rows(targets.projected)
    kept_N = _kept_logprobs(ids_NK, logprobs_NK, labels_BL.reshape(-1, 1))
    tolerance = LOGPROB_TOLERANCE_NATS + error.label_nats + error.kept_nats
    apart_N = np.abs(np.where(kept_N > -np.inf, kept_N, 0) - np.maximum(targets.logprobs_BL.ravel(), error.floor_nats))
    bad: npt.NDArray[np.bool_] = (kept_N > -np.inf) & (apart_N > tolerance)
    return bad.reshape(labels_BL.shape)


def _contradictions_topk(
    labels_BL: npt.NDArray[np.int32], targets: TopkTargets, error: StoredError
) -> npt.NDArray[np.bool_]:
    top_k = targets.ids_BLK.shape[2]
    ids_NK, logprobs_NK = targets.ids_BLK.reshape(-1, top_k), targets.logprobs_BLK.reshape(-1, top_k)
    kept_logprob_N = _kept_logprobs(ids_NK, logprobs_NK, labels_BL.reshape(-1, 1))
    is_kept_N = kept_logprob_N > -np.inf
    label_N = targets.label_logprobs_BL.ravel()
    # a kept label is compared with its own kept logprob, any other label with the last kept logprob of its row
    bound_N = np.where(is_kept_N, kept_logprob_N, logprobs_NK[:, -1])
    padded = np.flatnonzero(np.isneginf(bound_N))
    bound_N[padded] = np.where(np.isneginf(logprobs_NK[padded]), 0.0, logprobs_NK[padded]).min(axis=1)
    tolerance = LOGPROB_TOLERANCE_NATS + error.label_nats + error.kept_nats
    # comparisons with NaN are false: an unknown logprob fails the check if its label is kept, and passes it otherwise
    agrees_N = np.abs(bound_N - np.maximum(label_N, error.floor_nats)) <= tolerance
    bad: npt.NDArray[np.bool_] = np.where(is_kept_N, ~agrees_N, label_N > bound_N + tolerance)
    return bad.reshape(labels_BL.shape)


def _kept_logprobs(
    ids_NK: npt.NDArray[np.integer], logprobs_NK: npt.NDArray[np.float32], labels_N1: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32]:
    """Return each label's logprob among the kept ids [N]; -inf where the label is not kept or is padding."""
    places = np.flatnonzero(ids_NK == labels_N1)
    kept_N = np.full(len(ids_NK), -np.inf, np.float32)
    # padding has id 0 as well, but stands behind the kept ids: in reverse order, the kept id is assigned last and wins
    kept_N[places[::-1] // ids_NK.shape[1]] = logprobs_NK.ravel()[places[::-1]]
    return kept_N
