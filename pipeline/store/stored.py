"""A member as it is stored: inflated, its structure checked, its columns not yet turned into ids and probabilities.

This is the host's part where a device decodes (`decode_on` of the loader). A sequence's part of a column is a slice:
of a list of fixed size its row, of others what lies between two offsets.

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
        fixed: by name [B, width].
        ragged: by name the values of all sequences, one after the other.
        offsets: by name where each sequence's values begin, and the last one's end [B + 1].
        widest_B: ids of each sequence's widest target; empty without targets.
    """

    fixed: dict[str, npt.NDArray[Any]]
    ragged: dict[str, npt.NDArray[Any]]
    offsets: dict[str, IntArray]
    widest_B: IntArray

    def __len__(self) -> int:
        return len(self.fixed["mask"])

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        arrays = (*self.fixed.values(), *self.ragged.values(), *self.offsets.values())
        return sum(int(array.nbytes) for array in arrays)


def part_bytes(codec: Codec, block: StoredBlock) -> dict[Part, int]:
    """Bytes of a block's values by what they speak of; no part that has none."""
    found: dict[Part, int] = {}
    arrays = block.fixed | block.ragged
    for field in codec.fields:
        found[field.part] = found.get(field.part, 0) + sum(int(arrays[name].nbytes) for name in field.columns)
    return found


def read_stored(codec: Codec, data: bytes, where: str, num_sequences: int | None = None) -> StoredBlock:
    """The columns of one member; `where` and `num_sequences` as for `Codec.decode`.

    Raises:
        CorruptError: the frame's checksum, the Arrow stream, its shapes or its lists' sizes are wrong. What the values
            say is for the device to check.
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
    """Ids of each sequence's widest target.

    Raises:
        ValueError: sizes of lists contradict one another, so that a sequence's values could be another's.
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
    """The sum of each row's counts [B, L].

    Raises:
        ValueError: a sequence has another number of counts than its rows say.
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
