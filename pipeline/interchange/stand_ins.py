"""Values that captures hold in place of minus infinity, or of an id that is missing.

OpenAI's API and vLLM's server write -9999 for a probability of 0, and other programs -1e9 or the smallest number of a
type. Arrays of one width are filled up with any id at such a logprob, and lists that must have one length with nulls.

Legend: D values of all targets, T targets, T1 the start of each target and the end of the last.
"""

from __future__ import annotations

import numpy as np

from capgap.pipeline.interchange.ragged import NULL, Int64Array
from capgap.schemas.records import BoolArray, FloatArray, IntArray

NO_ID = NULL
"""The value that takes the place of a missing id."""

# No model gives such a logprob: its logits would have to differ by a thousand nats.
LEAST_NATS = -1000.0
# Stored for a probability of 0: far below what any profile can represent, and finite, so that it can be subtracted.
ZERO_NATS = np.float32(-100.0)


def is_stand_in(logprobs: FloatArray) -> BoolArray:
    """Return where a logprob stands for a probability of 0."""
    found: BoolArray = logprobs <= LEAST_NATS
    return found


def without_stand_ins(ids_D: IntArray, logprobs_D: FloatArray, ends_T1: Int64Array) -> tuple[IntArray, FloatArray]:
    """Return ids and logprobs in which every filling entry has the id NO_ID, and a probability of 0 is `ZERO_NATS`.

    An entry with a probability of 0 is a filling one if its id is negative, or is in the target already.
    """
    zero_D = is_stand_in(logprobs_D)
    nothing_D = (ids_D < 0) & np.isnan(logprobs_D)
    if not (zero_D.any() or nothing_D.any()):
        return ids_D, logprobs_D
    target_D = np.repeat(np.arange(len(ends_T1) - 1), np.diff(ends_T1))
    # an id that is twice in a target is sorted so that its entry with a probability comes first
    order_D = np.lexsort((zero_D, ids_D, target_D))
    again_D = np.zeros(len(ids_D), np.bool_)
    same = (np.diff(ids_D[order_D]) == 0) & (np.diff(target_D[order_D]) == 0)
    again_D[order_D[1:][same]] = True
    ids_D = np.where(nothing_D | zero_D & ((ids_D < 0) | again_D), NO_ID, ids_D)
    logprobs_D = np.where(zero_D, ZERO_NATS, logprobs_D)
    logprobs_D = np.where(ids_D == NO_ID, -np.inf, logprobs_D)
    return ids_D.astype(np.int32), logprobs_D.astype(np.float32)
