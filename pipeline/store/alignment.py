"""The proof that target i belongs to the token at i + 1: an off-by-one can be neither stored nor loaded unseen.

Every row carries the teacher's logprob of the real next token, taken from the logits themselves. The kept
distribution must agree with it:

- `topk`: where the next token is among the kept ids, its kept logprob is that logprob; where it is not, its
  probability is at most that of the last kept id.
- `sampled`: a systematic draw gives every id the floor or the ceiling of n p draws, so the next token's count lies
  within one of n exp(logprob).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from capgap.schemas.errors import CorruptError
from capgap.schemas.records import SampledTargets, Sequences, Targets, TopkTargets

# The same float32 logprob stands in both places, so they may differ by rounding alone.
_LOGPROB_TOLERANCE_NATS = 1e-4
# n p is rounded in float32 and the draw's cumulative sums in another order: a hundredth of a draw covers both.
_COUNT_TOLERANCE = 1e-2


def check_alignment(sequences: Sequences, targets: Targets, num_draws: int, where: str) -> None:
    """Raise CorruptError, naming the first row, where a target contradicts the token that follows it."""
    labels_BL = sequences.tokens_BL1[:, 1:]
    if isinstance(targets, SampledTargets):
        bad_BL = _contradictions_sampled(labels_BL, targets, num_draws)
    else:
        bad_BL = _contradictions_topk(labels_BL, targets)
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
    labels_BL: npt.NDArray[np.int32], targets: SampledTargets, num_draws: int
) -> npt.NDArray[np.bool_]:
    num_rows = labels_BL.size
    row_D = np.repeat(np.arange(num_rows), targets.num_ids_BL.ravel())
    is_label_D = targets.ids_D == labels_BL.ravel()[row_D]
    count_N = np.bincount(row_D[is_label_D], weights=targets.counts_D[is_label_D], minlength=num_rows)
    expected_N = num_draws * np.exp(targets.label_logprobs_BL.ravel().astype(np.float64))
    bad: npt.NDArray[np.bool_] = np.abs(count_N - expected_N) >= 1 + _COUNT_TOLERANCE
    return bad.reshape(labels_BL.shape)


def _contradictions_topk(labels_BL: npt.NDArray[np.int32], targets: TopkTargets) -> npt.NDArray[np.bool_]:
    is_label_BLK = targets.ids_BLK == labels_BL[:, :, None]
    kept_BL = is_label_BLK.any(axis=2)
    kept_logprob_BL = np.where(is_label_BLK, targets.logprobs_BLK, -np.inf).max(axis=2)
    apart_BL = np.abs(np.where(kept_BL, kept_logprob_BL, 0.0) - targets.label_logprobs_BL) > _LOGPROB_TOLERANCE_NATS
    above_BL = targets.label_logprobs_BL > targets.logprobs_BLK[:, :, -1] + _LOGPROB_TOLERANCE_NATS
    bad: npt.NDArray[np.bool_] = np.where(kept_BL, apart_BL, above_BL)
    return bad
