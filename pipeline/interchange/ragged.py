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

NULL = np.iinfo(np.int32).min
"""The value that takes the place of a whole number that is null."""


@dataclass(frozen=True)
class Ragged:
    """Lists of any size, stored one after the other.

    Attributes:
        values: Values of all lists: an array of numbers, or a `Ragged` of inner lists.
        ends_R1: Index where each list begins, and the end of the last one [R + 1].
    """

    values: Any
    ends_R1: Int64Array

    def __len__(self) -> int:
        return len(self.ends_R1) - 1

    @property
    def sizes_R(self) -> Int64Array:  # noqa: N802  # named as the fields are
        """Number of values in each list."""
        return np.diff(self.ends_R1)

    def row(self, number: int) -> Any:
        """Return one list: its numbers, or its inner lists."""
        return self.part(int(self.ends_R1[number]), int(self.ends_R1[number + 1]))

    def part(self, start: int, stop: int) -> Any:
        """Return the values from `start` up to but not including `stop`."""
        return self.values.lists(start, stop) if isinstance(self.values, Ragged) else self.values[start:stop]

    def lists(self, start: int, stop: int) -> Ragged:
        """Return the lists of numbers from `start` up to but not including `stop`."""
        ends_R1 = self.ends_R1[start : max(start, stop) + 1]
        return Ragged(self.values[ends_R1[0] : ends_R1[-1]], ends_R1 - ends_R1[0])


def lists_of(column: pa.Array, depth: int, kind: Any, where: str) -> Ragged:
    """Read a column of lists, or of lists of lists where `depth` is 2; a null list is empty.

    Padding may hold numbers that do not fit `kind`, and it is not known here which positions are padding. So a null
    whole number becomes `NULL`, and all numbers of a batch are int64 where one does not fit.

    Args:
        column: Column of a record batch.
        depth: 1 or 2.
        kind: numpy's type of the numbers; a null is NaN where it is a floating type.
        where: Name of the column, for errors.

    Raises:
        InputError: The column does not hold such lists.
    """
    if not _is_list(column.type):
        raise InputError("not a column of lists", where=where, found=str(column.type), expected=_named(depth, kind))
    sizes = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    ends_R1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    values = column.flatten()
    if depth > 1:
        return Ragged(lists_of(values, depth - 1, kind, where), ends_R1)
    return Ragged(_numbers(values, kind, where), ends_R1)


def fits(numbers_D: npt.NDArray[Any], kind: Any) -> npt.NDArray[np.bool_]:
    """Return which of these whole numbers are not null, and fit the type `kind` [D]."""
    if numbers_D.dtype == kind and np.iinfo(kind).min > NULL:
        return np.ones(len(numbers_D), np.bool_)
    limits = np.iinfo(kind)
    found_D: npt.NDArray[np.bool_] = (numbers_D >= limits.min) & (numbers_D <= limits.max) & (numbers_D != NULL)
    return found_D


def _numbers(values: pa.Array, kind: Any, where: str) -> npt.NDArray[Any]:
    is_floating = bool(np.issubdtype(kind, np.floating))
    known = pa.types.is_integer(values.type) or pa.types.is_boolean(values.type) or pa.types.is_null(values.type)
    if not (known or (is_floating and pa.types.is_floating(values.type))):
        raise InputError("not numbers of that kind", where=where, found=str(values.type), expected=_named(0, kind))
    if not is_floating:
        return _whole(values, kind)
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan, kind)
    numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    if values.null_count and not np.issubdtype(numbers.dtype, np.floating):
        numbers = numbers.astype(np.float64)
    with np.errstate(over="ignore"):
        return numbers.astype(kind)


def _whole(values: pa.Array, kind: Any) -> npt.NDArray[Any]:
    is_null = values.is_null().to_numpy(zero_copy_only=False) if values.null_count else None
    if pa.types.is_null(values.type):
        values = values.cast(pa.int64())
    if is_null is not None:
        values = values.fill_null(False if pa.types.is_boolean(values.type) else 0)
    numbers: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    limits = np.iinfo(kind)
    too_large = numbers.size and numbers.dtype != np.bool_ and numbers.max() > limits.max
    too_small = numbers.size and numbers.dtype != np.bool_ and numbers.min() < limits.min
    # converted to int64, so that a number that does not fit `kind` is not turned into another one
    if too_large or too_small or (is_null is not None and limits.min > NULL):
        largest = np.iinfo(np.int64).max
        numbers = (np.minimum(numbers, largest) if numbers.dtype == np.uint64 else numbers).astype(np.int64)
    else:
        numbers = numbers.astype(kind)
    if is_null is not None:
        numbers[is_null] = NULL
    return numbers


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _named(depth: int, kind: Any) -> str:
    name = "float" if np.issubdtype(kind, np.floating) else "int"
    return "list<" * depth + name + ">" * depth
