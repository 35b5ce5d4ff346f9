"""Arrays as Arrow columns and back, without an object per value, and the zstd frame around them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zstandard

# A member holds some thousand tokens; a frame that claims more than this is not one of ours.
MAX_MEMBER_BYTES = 1 << 30


def fixed_lists(values_BW: npt.NDArray[Any]) -> pa.Array:
    """[B, W] as B lists of W values each."""
    flat = pa.array(np.ascontiguousarray(values_BW).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values_BW.shape[1])


def lists(values_D: npt.NDArray[Any], lengths_B: npt.NDArray[Any]) -> pa.Array:
    """[D] cut into B lists of the given lengths."""
    offsets = np.zeros(len(lengths_B) + 1, dtype=np.int32)
    np.cumsum(lengths_B, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_D))


class Columns:
    """The columns of one record batch, each to be read once.

    Args:
        batch: one row a sequence.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._unread = set(batch.schema.names)

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def fixed(self, name: str, width: int, kind: Any = np.uint8) -> npt.NDArray[Any]:
        """Lists of one size as [B, width].

        Raises:
            KeyError: there is no such column.
            ValueError: the lists have another width, or hold other values.
        """
        column = self._take(name)
        if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
            raise ValueError(f"column {name} is {column.type}, expected fixed-size lists of {width}")
        return _values(column, name, kind).reshape(len(self), width)

    def ragged(self, name: str, kind: Any = np.uint8) -> npt.NDArray[Any]:
        """The values of lists of any size, one list after the other.

        Raises:
            KeyError: there is no such column.
            ValueError: it is no column of lists, or holds other values.
        """
        return self.ragged_parts(name, kind)[0]

    def ragged_parts(self, name: str, kind: Any = np.uint8) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """What `ragged` gives, and where each list begins and the last one ends [B + 1].

        Raises:
            KeyError, ValueError: as `ragged`, or the lists do not lie one after the other.
        """
        column = self._take(name)
        if not pa.types.is_list(column.type):
            raise ValueError(f"column {name} is {column.type}, expected lists")
        values, offsets = _values(column, name, kind), column.offsets.to_numpy().astype(np.int64)
        if len(offsets) and (offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any()):
            raise ValueError(f"lists of column {name} do not lie one after the other")
        return values, offsets

    def require_all_read(self) -> None:
        """Raise ValueError if there are columns that nobody asked for: the member is of another codec."""
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
    """One record batch as an Arrow IPC stream in one zstd frame with a checksum.

    Arrow's own compression is off: it has no checksum.
    """
    batch = pa.record_batch(list(columns.values()), names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(sink.getvalue())


def from_frame(data: bytes, most_bytes: int = MAX_MEMBER_BYTES) -> Columns:
    """The columns of one frame, which may be anyone's: nothing that it claims is believed before it is checked.

    Args:
        data: the frame.
        most_bytes: that it may be once inflated; memory for no more is asked for.

    Raises:
        zstandard.ZstdError: the frame is damaged.
        ValueError: the frame has no checksum, claims to be larger than it may be, or holds another stream than ours.
        pa.ArrowException, OSError, StopIteration, struct.error: the stream is not one.
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
        # it would be inflated to whatever size it claims
        raise ValueError("a record batch that is compressed within the frame")
    found = pa.ipc.read_record_batch(batch, pa.ipc.read_schema(schema))
    found.validate()  # lengths that pass their buffers' ends would be read past them
    return found


def _is_compressed(message: memoryview) -> bool:
    """Whether a record batch names a compression: field 3 of the table that is field 2 of Message, in Arrow's
    Message.fbs. Nothing in pyarrow tells; that the tables lie within the message was checked when it was read."""
    (root,) = struct.unpack_from("<I", message, 0)
    header = _field(message, root, 2)
    if not header:
        raise ValueError("a message without a header")
    (distance,) = struct.unpack_from("<I", message, header)
    return _field(message, header + distance, 3) != 0


def _field(message: memoryview, table: int, number: int) -> int:
    """Where a field of a flatbuffers table lies; 0 where it is left out."""
    (back,) = struct.unpack_from("<i", message, table)
    (size,) = struct.unpack_from("<H", message, table - back)
    place = 4 + 2 * number
    (offset,) = struct.unpack_from("<H", message, table - back + place) if place + 2 <= size else (0,)
    return table + offset if offset else 0
