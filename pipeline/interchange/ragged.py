"""Columns of lists from Arrow as numpy arrays, without an object per value.

Legend: R rows of a batch, D values of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capgap.schemas.errors import InputError

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Lists of any size, one after the other.

    Attributes:
        values: of all lists: an array of numbers, or lists again.
        ends_R1: where each list begins, and the last one's end.
    """

    values: Any
    ends_R1: Int64Array

    def __len__(self) -> int:
        return len(self.ends_R1) - 1

    @property
    def sizes_R(self) -> Int64Array:  # noqa: N802  # a field in all but name
        """The size of each list."""
        return np.diff(self.ends_R1)

    def row(self, number: int) -> Any:
        """One list: its numbers, or its lists."""
        return self.part(int(self.ends_R1[number]), int(self.ends_R1[number + 1]))

    def part(self, start: int, stop: int) -> Any:
        """The values from `start` on and before `stop`."""
        return self.values.lists(start, stop) if isinstance(self.values, Ragged) else self.values[start:stop]

    def lists(self, start: int, stop: int) -> Ragged:
        """The lists of numbers from `start` on and before `stop`."""
        ends_R1 = self.ends_R1[start : max(start, stop) + 1]
        return Ragged(self.values[ends_R1[0] : ends_R1[-1]], ends_R1 - ends_R1[0])


def lists_of(column: pa.Array, depth: int, kind: Any, where: str, filling: int | None = None) -> Ragged:
    """A column of lists, of lists of lists where `depth` is 2; a list that is null is empty.

    Args:
        column: of a record batch.
        depth: 1 or 2.
        kind: numpy's type of the numbers; nulls are NaN for a floating one, and an error for another.
        where: names the column in errors.
        filling: what a null is where the numbers are whole ones; None where none may be null.

    Raises:
        InputError: it has no such lists, or null where a number must be.
    """
    if not _is_list(column.type):
        raise InputError("not a column of lists", where=where, found=str(column.type), expected=_named(depth, kind))
    sizes = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    ends_R1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    values = column.flatten()
    if depth > 1:
        return Ragged(lists_of(values, depth - 1, kind, where, filling), ends_R1)
    if filling is not None and pa.types.is_integer(values.type) and values.null_count:
        values = values.cast(pa.int64()).fill_null(filling)
    return Ragged(_numbers(values, kind, where), ends_R1)


def _numbers(values: pa.Array, kind: Any, where: str) -> npt.NDArray[Any]:
    known = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if np.issubdtype(kind, np.floating):
        known = known or pa.types.is_floating(values.type)
    if not known:
        raise InputError("not numbers of that kind", where=where, found=str(values.type), expected=_named(0, kind))
    if values.null_count and not np.issubdtype(kind, np.floating):
        raise InputError("null where a number must be", where=where, found=f"{values.null_count} in a batch")
    numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if values.null_count and not np.issubdtype(numbers.dtype, np.floating):
        numbers = numbers.astype(np.float64)
    if np.issubdtype(kind, np.floating):
        with np.errstate(over="ignore"):
            return numbers.astype(kind)
    # an id past 32 bits must not come out as another
    largest = np.iinfo(kind).max
    if numbers.size and numbers.dtype != np.bool_ and (numbers.max() > largest or numbers.min() < np.iinfo(kind).min):
        raise InputError("a number too large", where=where, found=int(numbers.max()), expected=f"at most {largest}")
    return numbers.astype(kind)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _named(depth: int, kind: Any) -> str:
    name = "float" if np.issubdtype(kind, np.floating) else "int"
    return "list<" * depth + name + ">" * depth
