"""Members as they are stored: inflated and checked in structure, but not yet decoded to ids and probabilities.

This is the host's part of the work if a device decodes (`decode_on` of the loader). A sequence's part of a column is a
slice: a row of a column of fixed-size lists, or the values between two offsets of a ragged column.

Legend: B sequences, L targets a sequence, K ids kept a row, n samples a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.pipeline.store.codec import Codec, decoding
from capgap.pipeline.store.columns import Columns, from_frame
from capgap.pipeline.store.layout import PROFILES, SAMPLED, SEQUENCES, Part

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StoredBlock:
    """The columns of one member.

    Attributes:
        fixed: The columns of fixed-size lists, by name [B, width].
        ragged: The concatenated values of all sequences, by column name.
        offsets: For each ragged column, the start of each sequence's values and the end of the last [B + 1].
        widest_B: Number of ids of each sequence's widest target [B]; empty without targets.
    """

    fixed: dict[str, npt.NDArray[Any]]
    ragged: dict[str, npt.NDArray[Any]]
    offsets: dict[str, IntArray]
    widest_B: IntArray

    def __len__(self) -> int:
        return len(self.fixed["mask"])

    @property
    def num_bytes(self) -> int:
        """Return the memory of the columns, in bytes."""
        arrays = (*self.fixed.values(), *self.ragged.values(), *self.offsets.values())
        return sum(int(array.nbytes) for array in arrays)


def part_bytes(codec: Codec, block: StoredBlock) -> dict[Part, int]:
    """Return the bytes of a block's values for each part of the format that the codec has, such as `ids`."""
    found: dict[Part, int] = {}
    arrays = block.fixed | block.ragged
    for field in codec.fields:
        found[field.part] = found.get(field.part, 0) + sum(int(arrays[name].nbytes) for name in field.columns)
    return found


def read_stored(codec: Codec, data: bytes, where: str, num_sequences: int | None = None) -> StoredBlock:
    """Return the columns of one member; the arguments are those of `Codec.decode`.

    Raises:
        CorruptError: The frame's checksum, the Arrow stream, its shapes or its lists' sizes are wrong. The values are
            not checked here, but on the device.
    """
    with decoding(codec, where):
        columns = from_frame(data, codec.most_bytes(num_sequences))
        fixed, ragged, offsets = {}, {}, {}
        for field in codec.fields:
            for name in field.columns:
                if field.width:
                    fixed[name] = columns.fixed(name, field.width, field.kind)
                else:
                    ragged[name], offsets[name] = columns.ragged_parts(name, field.kind)
        columns.require_all_read()
        return StoredBlock(fixed, ragged, offsets, _widest(codec, columns, fixed, ragged, offsets))


def _widest(
    codec: Codec,
    columns: Columns,
    fixed: dict[str, npt.NDArray[Any]],
    ragged: dict[str, npt.NDArray[Any]],
    offsets: dict[str, IntArray],
) -> IntArray:
    """Return the number of ids of each sequence's widest target [B].

    Raises:
        ValueError: Sizes of lists contradict one another, so that values could be taken for those of another sequence.
    """
    columns_of = {field.name: field.columns for field in codec.fields}
    if codec.name == SEQUENCES:
        return np.zeros(0, np.int64)
    if codec.name == SAMPLED:
        num_repeated_BL = fixed["num_repeated"]
        if ragged["counts"].min(initial=2) < 2:
            raise ValueError("a count of 1 among those of ids sampled at least twice")
        sums_BL = _row_sums(ragged["counts"], offsets["counts"], num_repeated_BL)
        num_once_BL = codec.num_ids - sums_BL
        if num_once_BL.min(initial=0) < 0:
            raise ValueError(f"more than {codec.num_ids} samples in a row")
        _require_sizes(offsets, columns_of["repeated"], num_repeated_BL.sum(axis=1, dtype=np.int64))
        _require_sizes(offsets, columns_of["once"], num_once_BL.sum(axis=1))
        widest_B: IntArray = (num_repeated_BL + num_once_BL).max(axis=1, initial=1)
        return widest_B
    if PROFILES[codec.name] == "small":
        num_kept_BL = fixed["top_k"]
        if num_kept_BL.size and (num_kept_BL.min() < 1 or num_kept_BL.max() > codec.num_ids):
            raise ValueError(f"{num_kept_BL.min()} to {num_kept_BL.max()} ids in a row")
        sizes_B = num_kept_BL.sum(axis=1, dtype=np.int64)
        _require_sizes(offsets, columns_of["ids"], sizes_B)
        _require_sizes(offsets, columns_of["quads"], -(-sizes_B // 4))
    return np.full(len(columns), codec.num_ids, np.int64)


def _row_sums(counts_R: npt.NDArray[Any], offsets: IntArray, num_repeated_BL: npt.NDArray[Any]) -> IntArray:
    """Return the sum of each row's counts [B, L].

    Raises:
        ValueError: A sequence's number of counts differs from the sum over its rows.
    """
    sizes_B = num_repeated_BL.sum(axis=1, dtype=np.int64)
    if not np.array_equal(np.diff(offsets), sizes_B):
        raise ValueError(f"{len(counts_R)} counts, expected {sizes_B.sum()}")
    ends_R = np.zeros(len(counts_R) + 1, np.int64)
    np.cumsum(counts_R, dtype=np.int64, out=ends_R[1:])
    ends_N = np.cumsum(num_repeated_BL.ravel(), dtype=np.int64)
    sums_N = np.diff(ends_R[ends_N], prepend=0)
    return sums_N.reshape(num_repeated_BL.shape)


def _require_sizes(offsets: dict[str, IntArray], names: Iterable[str], sizes_B: IntArray) -> None:
    for name in names:
        if not np.array_equal(np.diff(offsets[name]), sizes_B):
            raise ValueError(f"column {name} has {offsets[name][-1]} entries, expected {sizes_B.sum()}")
