"""What servers and arrays have in the place of minus infinity, of an id, and of nothing at all.

OpenAI's API and vLLM's server write -9999 for a probability of 0, others -1e9 or the smallest number of a type; arrays
of one width are filled up with an id, any, that has such a logprob; and lists that cannot be ragged have nulls.

Legend: D values of all targets, T targets, T1 where each begins, and the last one's end.
"""

from __future__ import annotations

import numpy as np

from capgap.pipeline.interchange.ragged import NULL, Int64Array
from capgap.schemas.records import BoolArray, FloatArray, IntArray

NO_ID = NULL
"""Stands for an id that is not there."""

# No model gives such a logprob: its logits would have to lie a thousand nats apart.
LEAST_NATS = -1000.0
# What is stored for a probability of 0: by far below what any profile tells apart, and finite where it is subtracted.
ZERO_NATS = np.float32(-100.0)


def is_stand_in(logprobs: FloatArray) -> BoolArray:
    """Where a logprob stands for a probability of 0."""
    found: BoolArray = logprobs <= LEAST_NATS
    return found


def without_stand_ins(ids_D: IntArray, logprobs_D: FloatArray, ends_T1: Int64Array) -> tuple[IntArray, FloatArray]:
    """Ids and logprobs, in which what only fills up a list is NO_ID, and a probability of 0 is `ZERO_NATS`.

    An id with a probability of 0 is dropped where it is none, or stands in the target already.
    """
    zero_D = is_stand_in(logprobs_D)
    nothing_D = (ids_D < 0) & np.isnan(logprobs_D)
    if not (zero_D.any() or nothing_D.any()):
        return ids_D, logprobs_D
    target_D = np.repeat(np.arange(len(ends_T1) - 1), np.diff(ends_T1))
    # of one id in a target the one with a probability comes first
    order_D = np.lexsort((zero_D, ids_D, target_D))
    again_D = np.zeros(len(ids_D), np.bool_)
    same = (np.diff(ids_D[order_D]) == 0) & (np.diff(target_D[order_D]) == 0)
    again_D[order_D[1:][same]] = True
    ids_D = np.where(nothing_D | zero_D & ((ids_D < 0) | again_D), NO_ID, ids_D)
    logprobs_D = np.where(zero_D, ZERO_NATS, logprobs_D)
    logprobs_D = np.where(ids_D == NO_ID, -np.inf, logprobs_D)
    return ids_D.astype(np.int32), logprobs_D.astype(np.float32)
