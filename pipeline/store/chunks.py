"""The values of `chunks` targets: two flags a target, and the chunk's logprob as the bits of a float32 in four planes.

Sums of a codec's logprobs, which are multiples of 1/64 nat as a rule, have low bytes of zeros: they cost next to
nothing, and no chunk is rounded a second time.

Legend: B sequences, L targets a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.checks import check_logprobs
from capgap.pipeline.store.layout import RaggedValues
from capgap.pipeline.store.planes import pack_bits, unpack_bits
from capgap.schemas.errors import InputError
from capgap.schemas.records import BoolArray, ChunkTargets


def chunk_values(targets: ChunkTargets) -> dict[str, npt.NDArray[Any] | RaggedValues]:
    """The values of one member, by field.

    Raises:
        InputError: a logprob is none, or stands where no chunk is kept; or a chunk is kept where none ends.
    """
    _check(targets)
    return {
        "chunk_ends": pack_bits(targets.ends_BL),
        "chunk_kept": pack_bits(targets.kept_BL),
        "chunk_logprobs": np.ascontiguousarray(targets.logprobs_BL, "<f4").view("<u4"),
    }


def chunk_targets(values: Mapping[str, npt.NDArray[Any]], seq_len: int) -> ChunkTargets:
    """The targets of one member, of its values by field; errors as `chunk_values`."""
    ends_BL, kept_BL = (unpack_bits(values[name], seq_len) for name in ("chunk_ends", "chunk_kept"))
    targets = ChunkTargets(ends_BL, kept_BL, np.ascontiguousarray(values["chunk_logprobs"]).view("<f4"))
    _check(targets)
    return targets


def left_in_chunk(targets: ChunkTargets) -> npt.NDArray[np.int64]:
    """How many targets of its chunk come after each target [B, L]; -1 in every chunk that is not kept, and in none."""
    length = targets.ends_BL.shape[1]
    places_L = np.arange(length)
    # the place of the next end, which an end itself is
    end_BL = np.where(targets.ends_BL, places_L, length)
    end_BL = np.minimum.accumulate(end_BL[:, ::-1], axis=1)[:, ::-1]
    kept_BL = np.take_along_axis(targets.kept_BL, np.minimum(end_BL, length - 1), 1) & (end_BL < length)
    left_BL: npt.NDArray[np.int64] = np.where(kept_BL, end_BL - places_L, -1)
    return left_BL


def chunks_without_labels(mask_BL1: BoolArray, targets: ChunkTargets) -> BoolArray:
    """Where a kept chunk holds a target that is no label [B, L]."""
    return (left_in_chunk(targets) >= 0) & ~mask_BL1[:, 1:]


def _check(targets: ChunkTargets) -> None:
    check_logprobs("logprobs_BL", targets.logprobs_BL)
    if (targets.kept_BL & ~targets.ends_BL).any():
        raise InputError("kept_BL: a chunk that is kept where none ends")
    if targets.logprobs_BL[~targets.kept_BL].any():
        raise InputError("logprobs_BL: a logprob where no chunk is kept")
