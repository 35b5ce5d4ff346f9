"""The stored values of `chunks` targets: two flags a target, and the chunk's logprob as a float32 in four byte planes.

If the codec keeps ids, it also stores projected targets: the number of ids of each target, the ids in planes, and
their logprobs and the tail as float32 bits.

A chunk's logprob is a sum of stored logprobs, which usually are multiples of 1/64 nat. The low bytes of such a float32
are zeros and compress to almost nothing, so chunks are stored without a second rounding.

Legend: B sequences, L targets a sequence, N = B x L rows, D ids of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.checks import check_finite, check_ids, check_logprobs
from capgap.pipeline.store.layout import RaggedValues
from capgap.pipeline.store.planes import pack_bits, unpack_bits
from capgap.schemas.errors import InputError
from capgap.schemas.records import BoolArray, ChunkTargets, FloatArray, ProjectedTargets

# logprobs of `compact` have an error of up to a tenth of a nat, which changes a sum of probabilities by up to 11 %
_TOTAL_TOLERANCE = 0.11


def chunk_values(targets: ChunkTargets, vocab_size: int, num_ids: int) -> dict[str, npt.NDArray[Any] | RaggedValues]:
    """Return the values of one member's targets, by field.

    Args:
        targets: Targets of the member.
        vocab_size: All ids are below this number.
        num_ids: Largest number of ids of a projected target; 0 if the codec has no projected targets.

    Raises:
        InputError: A value is no logprob, or is not 0 where no chunk is kept; a chunk is kept where none ends; a
            projected target is no distribution, or does not belong to a kept chunk of one token.
    """
    _check(targets, vocab_size, num_ids)
    values: dict[str, npt.NDArray[Any] | RaggedValues] = {
        "chunk_ends": pack_bits(targets.ends_BL),
        "chunk_kept": pack_bits(targets.kept_BL),
        "chunk_logprobs": _bits_of(targets.logprobs_BL),
    }
    projected = targets.projected
    if projected is not None:
        sizes_B = projected.num_ids_BL.sum(axis=1)
        values |= {
            "top_k": projected.num_ids_BL,
            "ids": RaggedValues(projected.ids_D, sizes_B),
            "logprobs": RaggedValues(_bits_of(projected.logprobs_D), sizes_B),
            "tail": _bits_of(projected.tail_BL),
        }
    return values


def chunk_targets(values: Mapping[str, npt.NDArray[Any]], seq_len: int, vocab_size: int, num_ids: int) -> ChunkTargets:
    """Build the targets of one member from its values by field; arguments and errors are those of `chunk_values`."""
    ends_BL, kept_BL = (unpack_bits(values[name], seq_len) for name in ("chunk_ends", "chunk_kept"))
    projected = None
    if num_ids:
        logprobs_D, tail_BL = (_floats_of(values[name]) for name in ("logprobs", "tail"))
        check_ids("ids", values["ids"], vocab_size)
        projected = ProjectedTargets(
            values["top_k"].astype(np.int32), values["ids"].astype(np.int32), logprobs_D, tail_BL
        )
    targets = ChunkTargets(ends_BL, kept_BL, _floats_of(values["chunk_logprobs"]), projected)
    _check(targets, vocab_size, num_ids)
    return targets


def left_in_chunk(targets: ChunkTargets) -> npt.NDArray[np.int64]:
    """Return how many targets of the same chunk follow each target [B, L], int64; -1 outside of kept chunks."""
    length = targets.ends_BL.shape[1]
    places_L = np.arange(length)
    # the place of the next chunk end, at or after each target
    end_BL = np.where(targets.ends_BL, places_L, length)
    end_BL = np.minimum.accumulate(end_BL[:, ::-1], axis=1)[:, ::-1]
    kept_BL = np.take_along_axis(targets.kept_BL, np.minimum(end_BL, length - 1), 1) & (end_BL < length)
    left_BL: npt.NDArray[np.int64] = np.where(kept_BL, end_BL - places_L, -1)
    return left_BL


def chunks_without_labels(mask_BL1: BoolArray, targets: ChunkTargets) -> BoolArray:
    """Return True for each target that lies in a kept chunk but is no label [B, L]."""
    return (left_in_chunk(targets) >= 0) & ~mask_BL1[:, 1:]


def padded_rows(projected: ProjectedTargets) -> tuple[npt.NDArray[np.int64], FloatArray, FloatArray]:
    """Return the ids and logprobs of each row [N, K], and the tails [N]; K is the number of ids of the widest row.

    Padding has id 0 and logprob -inf. In a row without a target, all is padding and the tail is 0.
    """
    num_ids_N = projected.num_ids_BL.ravel()
    filled_NK = np.arange(max(1, num_ids_N.max(initial=0))) < num_ids_N[:, None]
    ids_NK, logprobs_NK = np.zeros(filled_NK.shape, np.int64), np.full(filled_NK.shape, -np.inf, np.float32)
    ids_NK[filled_NK], logprobs_NK[filled_NK] = projected.ids_D, projected.logprobs_D
    return ids_NK, logprobs_NK, projected.tail_BL.ravel()


def _bits_of(values: FloatArray) -> npt.NDArray[np.uint32]:
    bits: npt.NDArray[np.uint32] = np.ascontiguousarray(values, "<f4").view("<u4")
    return bits


def _floats_of(bits: npt.NDArray[Any]) -> FloatArray:
    floats: FloatArray = np.ascontiguousarray(bits).view("<f4")
    return floats


def _check(targets: ChunkTargets, vocab_size: int, num_ids: int) -> None:
    _check_chunks(targets)
    if (targets.projected is not None) != (num_ids > 0):
        raise InputError("projected: targets and codec disagree on whether there are any", expected=num_ids)
    if targets.projected is not None:
        _check_projected(targets, targets.projected, vocab_size, num_ids)


def _check_projected(targets: ChunkTargets, projected: ProjectedTargets, vocab_size: int, num_ids: int) -> None:
    num_ids_N, has_N = projected.num_ids_BL.ravel(), projected.num_ids_BL.ravel() > 0
    if num_ids_N.min(initial=0) < 0 or num_ids_N.max(initial=0) > num_ids:
        raise InputError("num_ids_BL: ids of a row", found=int(num_ids_N.max()), expected=f"0 to {num_ids}")
    if not num_ids_N.sum() == len(projected.ids_D) == len(projected.logprobs_D):
        raise InputError("ids, logprobs and num_ids disagree", found=len(projected.ids_D), expected=num_ids_N.sum())
    check_ids("ids_D", projected.ids_D, vocab_size)
    check_logprobs("logprobs_D", projected.logprobs_D)
    check_finite("tail_BL", projected.tail_BL)
    if projected.tail_BL.min(initial=0) < 0 or projected.tail_BL[projected.num_ids_BL == 0].any():
        raise InputError("tail_BL: a tail below 0, or a tail in a row without a target")
    if (has_N & ~((left_in_chunk(targets) == 0) & _begins(targets)).ravel()).any():
        raise InputError("projected: a target that does not belong to a kept chunk of one token")
    if len(projected.ids_D) == 0:
        return
    row_D = np.repeat(np.arange(len(num_ids_N)), num_ids_N)
    kept_N = np.bincount(row_D, np.exp(projected.logprobs_D.astype(np.float64)), len(num_ids_N))
    total_N = kept_N.astype(np.float64) + projected.tail_BL.ravel()
    if (np.abs(total_N[has_N] - 1) > _TOTAL_TOLERANCE).any():
        raise InputError("projected: the probabilities and the tail of a target do not sum to 1")
    is_same_row = row_D[1:] == row_D[:-1]
    if (projected.logprobs_D[1:] > projected.logprobs_D[:-1])[is_same_row].any():
        raise InputError("logprobs_D: logprobs that rise within a row")
    key_D = np.sort(row_D * vocab_size + projected.ids_D)
    if (key_D[1:] == key_D[:-1]).any():
        raise InputError("ids_D: an id twice in a row")


def _begins(targets: ChunkTargets) -> BoolArray:
    """Return True for each target that begins a chunk [B, L]."""
    begins_BL = np.ones_like(targets.ends_BL)
    begins_BL[:, 1:] = targets.ends_BL[:, :-1]
    return begins_BL


def _check_chunks(targets: ChunkTargets) -> None:
    check_logprobs("logprobs_BL", targets.logprobs_BL)
    if (targets.kept_BL & ~targets.ends_BL).any():
        raise InputError("kept_BL: a chunk is kept at a target where no chunk ends")
    if targets.logprobs_BL[~targets.kept_BL].any():
        raise InputError("logprobs_BL: a logprob where no chunk is kept")
