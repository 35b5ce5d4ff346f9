"""Targets from columns of lists: ids, their logprobs, and where the columns exist tails and labels' logprobs.

Legend: M tokens of a row, T targets of a row, W ids of its widest target, D values of all targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capgap.pipeline.interchange.captures import RowTargets, checked_targets
from capgap.pipeline.interchange.parquet import targets_of
from capgap.pipeline.interchange.ragged import Ragged, fits, lists_of
from capgap.pipeline.interchange.stand_ins import NO_ID, is_stand_in, without_stand_ins
from capgap.schemas.errors import InputError
from capgap.schemas.interchange import ColumnNames
from capgap.schemas.records import FloatArray, IntArray


class ListTargets:
    """A reader of targets from columns of lists.

    Args:
        columns: Names of the columns.
        vocab_size: Size of the vocabulary; every id must be smaller.
        offset: 0 where the first target follows the first token, -1 where the first target predicts the first token.
    """

    def __init__(self, columns: ColumnNames, vocab_size: int, offset: int = 0) -> None:
        self.required: tuple[str, ...] = (columns.ids, columns.logprobs)
        self.optional: tuple[str, ...] = (columns.tail, columns.label_logprobs)
        self._columns, self._vocab_size, self._offset = columns, vocab_size, offset
        self._lists: dict[str, Ragged] = {}

    def open(self, batch: pa.RecordBatch, where: str) -> None:
        """Take the columns of a batch of rows."""
        names = self._columns
        kinds: dict[str, tuple[int, Any]] = {names.ids: (2, np.int32), names.logprobs: (2, np.float32)}
        kinds |= {names.tail: (1, np.float32), names.label_logprobs: (1, np.float32)}
        self._lists = {
            name: lists_of(batch.column(name), *kind, f"{where}, {name}")
            for name, kind in kinds.items()
            if name in batch.schema.names
        }

    def row(self, number: int, tokens_M: IntArray, keep: slice, where: str) -> RowTargets:
        """Return the targets of a row's tokens that are not padding."""
        names, skipped = self._columns, -self._offset
        ids, logprobs = self._lists[names.ids].row(number), self._lists[names.logprobs].row(number)
        num_targets = max(len(ids) - skipped, 0)
        part = targets_of(keep, num_targets, len(tokens_M), where)
        own = slice(part.start + skipped, part.stop + skipped)
        if part.stop - part.start == len(tokens_M[keep]) > 0 and ids.sizes_R[own.stop - 1] == 0:
            own = slice(own.start, own.stop - 1)  # the last token of a row may have no target
        ids, logprobs = ids.lists(own.start, own.stop), logprobs.lists(own.start, own.stop)
        if not np.array_equal(ids.ends_R1, logprobs.ends_R1):
            raise InputError(
                "not as many logprobs as ids",
                where=where,
                found=f"{len(logprobs)} lists with {logprobs.ends_R1[-1]} in all",
                expected=f"{len(ids)} with {ids.ends_R1[-1]}",
            )
        ids_D = self._narrowed(ids.values, logprobs.values, where)
        values_D, logprobs_D = without_stand_ins(ids_D, logprobs.values, ids.ends_R1)
        below_D = values_D[(values_D < 0) & (values_D != NO_ID)]
        if len(below_D):
            raise InputError("an id below 0", where=where, found=int(below_D[0]), expected="ids of the vocabulary")
        ids_TW, logprobs_TW = _filled(values_D, ids, -1), _filled(logprobs_D, ids, -np.inf)
        ids_TW[ids_TW < 0] = -1
        tail_T, labels_T = (self._numbers(name, number, own) for name in (names.tail, names.label_logprobs))
        if tail_T is not None and len(tail_T) != len(ids):
            raise InputError("not as many tails as targets", where=where, found=len(tail_T), expected=len(ids))
        if labels_T is not None:
            labels_T = np.where(is_stand_in(labels_T), np.float32(np.nan), labels_T)
        return checked_targets(tokens_M[keep], ids_TW, logprobs_TW, tail_T, labels_T, self._vocab_size, where)

    def _narrowed(self, ids_D: npt.NDArray[Any], logprobs_D: FloatArray, where: str) -> IntArray:
        """Return ids as int32; one that does not fit becomes -1 if it only fills up a list, or is refused."""
        if ids_D.dtype == np.int32:
            return ids_D
        outside_D = ~fits(ids_D, np.int32) & (ids_D != NO_ID)
        wrong_D = outside_D & ~is_stand_in(logprobs_D)
        if wrong_D.any():
            raise InputError(
                "an id outside the vocabulary",
                where=where,
                found=int(ids_D[wrong_D][0]),
                expected=f"0 to {self._vocab_size - 1}, the tokenizer's",
                fix="name the tokenizer of the teacher that made the captures",
            )
        narrowed_D: IntArray = np.where(outside_D, -1, ids_D).astype(np.int32)
        return narrowed_D

    def _numbers(self, name: str, number: int, own: slice) -> npt.NDArray[np.float32] | None:
        if name not in self._lists:
            return None
        values: npt.NDArray[np.float32] = self._lists[name].row(number)[own]
        return values


def _filled(values_D: npt.NDArray[Any], of: Ragged, filling: float) -> npt.NDArray[Any]:
    """Return lists [T] as an array [T, W], with `filling` after the last value of each list."""
    sizes_T = of.sizes_R
    width = int(sizes_T.max(initial=0))
    start, stop = int(of.ends_R1[0]), int(of.ends_R1[-1])
    if len(of) * width == stop - start:
        return np.ascontiguousarray(values_D[start:stop].reshape(len(of), width))
    filled_TW = np.full((len(of), width), filling, values_D.dtype)
    filled_TW[np.arange(width) < sizes_T[:, None]] = values_D[start:stop]
    return filled_TW
