"""Arrays as Arrow columns and back, without an object per value, and the zstd frame around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

# A member holds some thousand tokens; a frame that claims more than this is not one of ours.
_MAX_MEMBER_BYTES = 1 << 30


def fixed_lists(values_BW: npt.NDArray[Any]) -> pa.Array:
    """[B, W] as B lists of W values each."""
    flat = pa.array(np.ascontiguousarray(values_BW).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_BW.shape[1])


def lists(values_D: npt.NDArray[Any], lengths_B: npt.NDArray[Any]) -> pa.Array:
    """[D] cut into B lists of the given lengths."""
    offsets = np.zeros(len(lengths_B) + 1, dtype=np.int32)
    np.cumsum(lengths_B, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_D))


def fixed_values(batch: pa.RecordBatch, name: str, width: int) -> npt.NDArray[Any]:
    """A column of fixed-size lists as [B, width].

    Raises:
        ValueError: the lists have another width.
    """
    column = batch.column(name)
    if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
        raise ValueError(f"column {name} is {column.type}, expected fixed-size lists of {width}")
    values: npt.NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    return values.reshape(batch.num_rows, width)


def values_of(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    """All values of a column of lists, one after the other."""
    values: npt.NDArray[Any] = batch.column(name).values.to_numpy(zero_copy_only=True)
    return values


def whole_frame(data: bytes) -> bytes:
    """What one zstd frame holds.

    Raises:
        zstandard.ZstdError: the frame is damaged.
        ValueError: the frame has no checksum, or claims to be larger than any member.
    """
    frame = zstandard.get_frame_parameters(data)
    if not frame.has_checksum:
        raise ValueError("a frame without a checksum")
    if frame.content_size > _MAX_MEMBER_BYTES:
        raise ValueError(f"a frame of {frame.content_size} bytes, expected at most {_MAX_MEMBER_BYTES}")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
