"""Conversion between arrays and Arrow columns without a Python object per value, and the zstd frame around them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

# A member holds a few thousand tokens. A frame that claims to be larger than this is refused before it is inflated.
MAX_MEMBER_BYTES = 1 << 30


def fixed_lists(values_BW: npt.NDArray[Any]) -> pa.Array:
    """Return an array [B, W] as an Arrow array of B lists of W values each."""
    flat = pa.array(np.ascontiguousarray(values_BW).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_BW.shape[1])


def lists(values_D: npt.NDArray[Any], lengths_B: npt.NDArray[Any]) -> pa.Array:
    """Return an array [D], cut into lists of the given lengths [B], as an Arrow array of B lists."""
    offsets = np.zeros(len(lengths_B) + 1, dtype=np.int32)
    np.cumsum(lengths_B, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_D))


class Columns:
    """The columns of one record batch; it keeps track of the columns that have not been read.

    Args:
        batch: Record batch with one row for each sequence.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._unread = set(batch.schema.names)

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def fixed(self, name: str, width: int, kind: Any = np.uint8) -> npt.NDArray[Any]:
        """Return a column of fixed-size lists as an array [B, width] of dtype `kind`.

        Raises:
            KeyError: There is no such column.
            ValueError: The lists have another width, or values of another type.
        """
        column = self._take(name)
        if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
            raise ValueError(f"column {name} is {column.type}, expected fixed-size lists of {width}")
        return _values(column, name, kind).reshape(len(self), width)

    def ragged(self, name: str, kind: Any = np.uint8) -> npt.NDArray[Any]:
        """Return the values of a column of lists of any size, concatenated, as an array [D] of dtype `kind`.

        Raises:
            KeyError: There is no such column.
            ValueError: It is no column of lists, or its values have another type.
        """
        return self.ragged_parts(name, kind)[0]

    def ragged_parts(self, name: str, kind: Any = np.uint8) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Return the values of `ragged`, and the offset of each list's start and of the last list's end [B + 1].

        Raises:
            KeyError: There is no such column.
            ValueError: The column or its values have another type, or the lists are not contiguous.
        """
        column = self._take(name)
        if not pa.types.is_list(column.type):
            raise ValueError(f"column {name} is {column.type}, expected lists")
        values, offsets = _values(column, name, kind), column.offsets.to_numpy().astype(np.int64)
        if len(offsets) and (offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any()):
            raise ValueError(f"lists of column {name} do not lie one after the other")
        return values, offsets

    def require_all_read(self) -> None:
        """Raise ValueError if a column was not read, because then the member was written by another codec."""
        if self._unread:
            raise ValueError(f"unknown columns {', '.join(sorted(self._unread))}")

    def _take(self, name: str) -> Any:
        self._unread.discard(name)
        return self._batch.column(name)


def _values(column: Any, name: str, kind: Any) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    if values.dtype != kind:
        raise ValueError(f"column {name} holds {values.dtype}, expected {np.dtype(kind)}")
    return values


def to_frame(columns: dict[str, pa.Array], level: int) -> bytes:
    """Encode columns as one record batch, in an Arrow IPC stream, in one zstd frame with a checksum.

    Arrow's own compression is off because it has no checksum.
    """
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(sink.getvalue())


def from_frame(data: bytes, most_bytes: int = MAX_MEMBER_BYTES) -> Columns:
    """Return the columns of one frame. The frame may come from anyone, so every size in it is checked before use.

    Args:
        data: Bytes of the frame.
        most_bytes: Largest allowed size of the inflated frame, in bytes; no more memory is allocated.

    Raises:
        zstandard.ZstdError: The frame is damaged.
        ValueError: The frame has no checksum, claims to be too large, or holds a stream that capgap does not write.
        pa.ArrowException, OSError, StopIteration, struct.error: The content is no Arrow IPC stream.
    """
    frame = zstandard.get_frame_parameters(data)
    if not frame.has_checksum:
        raise ValueError("a frame without a checksum")
    if frame.content_size > most_bytes:
        raise ValueError(f"a frame of {frame.content_size} bytes, expected at most {most_bytes}")
    content = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    return Columns(_only_batch(content))


def _only_batch(content: bytes) -> pa.RecordBatch:
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(content))
    schema, batch = messages.read_next_message(), messages.read_next_message()
    if (schema.type, batch.type) != ("schema", "record batch") or next(iter(messages), None) is not None:
        raise ValueError("a stream of other messages than one schema and one record batch")
    if _is_compressed(memoryview(batch.metadata)):
        # Arrow would inflate it to any size that it claims
        raise ValueError("a record batch that is compressed within the frame")
    found = pa.ipc.read_record_batch(batch, pa.ipc.read_schema(schema))
    found.validate()  # otherwise, wrong lengths would read beyond the ends of their buffers
    return found


def _is_compressed(message: memoryview) -> bool:
    """Return whether a record batch is compressed: field 3 of the table in field 2 of Message (Arrow's Message.fbs).

    pyarrow has no function for this. It checked that the tables lie within the message when it read the message."""
    (root,) = struct.unpack_from("<I", message, 0)
    header = _field(message, root, 2)
    if not header:
        raise ValueError("a message without a header")
    (distance,) = struct.unpack_from("<I", message, header)
    return _field(message, header + distance, 3) != 0


def _field(message: memoryview, table: int, number: int) -> int:
    """Return the offset of a field of a flatbuffers table; 0 if the field is absent."""
    (back,) = struct.unpack_from("<i", message, table)
    (size,) = struct.unpack_from("<H", message, table - back)
    place = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", message, table - back + place) if place + 2 <= size else (0,)
    return table + offset if offset else 0
