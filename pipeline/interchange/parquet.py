"""Captures from Parquet files: some rows at a time, each checked and without its padding.

Legend: M tokens of a row.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from capgap.pipeline.interchange.captures import CapturedRow, RowTargets, begins_with
from capgap.pipeline.interchange.ragged import NULL, Ragged, lists_of
from capgap.schemas.errors import InputError
from capgap.schemas.interchange import ColumnNames
from capgap.schemas.records import BoolArray, IntArray

SUFFIX = ".parquet"
IGNORED_LABEL = -100

# Sixteen rows of four thousand tokens with a hundred ids each take a hundred megabytes.
_BATCH_ROWS = 16


class TargetReader(Protocol):
    """Reads the targets of rows from columns of one layout."""

    required: tuple[str, ...]
    """Columns that must exist."""

    optional: tuple[str, ...]
    """Columns that are read where they exist."""

    def open(self, batch: pa.RecordBatch, where: str) -> None:
        """Take the columns of a batch of rows."""

    def row(self, number: int, tokens_M: IntArray, keep: slice, where: str) -> RowTargets:
        """Return the targets of the row's tokens that are not padding; values in the padding are ignored."""


@dataclass(frozen=True)
class Layout:
    """How a file's columns are read.

    Attributes:
        columns: Names of the columns.
        vocab_size: Size of the vocabulary; every id must be smaller.
        targets: Reader of the targets; None to read tokens alone.
        end_padding: Id that does not count as a label at the end of a row; None where there is no such id.
        bos_ids: Ids that do not count as labels where they begin a row or a document.
    """

    columns: ColumnNames
    vocab_size: int
    targets: TargetReader | None = None
    end_padding: int | None = None
    bos_ids: tuple[int, ...] = ()


def list_captures(sources: tuple[str, ...]) -> list[Path]:
    """Return the Parquet files that these files, folders and globs name, in reading order, each once.

    Raises:
        InputError: A source names no file.
    """
    files: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file())
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if Path(name).is_file()]  # noqa: PTH207 (an absolute pattern)
        if not found:
            raise InputError("no captures found", where=source, expected=f"a {SUFFIX} file, a folder or a glob of such")
        for path in found:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def open_file(path: Path) -> Any:
    """Open a Parquet file.

    Raises:
        InputError: The file is not a Parquet file.
    """
    try:
        return pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError("not a Parquet file", where=path, found=_first_line(error)) from None


def require_columns(file: Any, path: Path, wanted: Sequence[str]) -> None:
    """Raise InputError unless an open file has these columns."""
    there = file.schema_arrow.names
    for name in wanted:
        if name not in there:
            raise InputError(
                f"no column {name!r}",
                where=path,
                found=", ".join(there),
                fix="name the columns with --columns.input_ids and so on, or the layout with --format",
            )


def batches_of(file: Any, path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield batches of rows of an open file.

    Raises:
        InputError: The file is damaged.
    """
    try:
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError("the file is damaged", where=path, found=_first_line(error)) from None


def read_rows(path: Path, layout: Layout) -> Iterator[CapturedRow]:
    """Yield every row of a file that has at least two tokens, in order.

    Raises:
        InputError: A column is missing or of another kind, a list is not as long as its row, an id lies outside the
            vocabulary, or the file is damaged.
    """
    file, names = open_file(path), layout.columns
    there = set(file.schema_arrow.names)
    wanted = [names.input_ids, *(layout.targets.required if layout.targets else ())]
    require_columns(file, path, wanted)
    marks = (names.loss_mask, names.labels, names.attention_mask, names.starts)
    wanted += [name for name in (*marks, *(layout.targets.optional if layout.targets else ())) if name in there]
    first = 0
    for batch in batches_of(file, path, wanted):
        where = f"{path}, rows {first} to {first + batch.num_rows - 1}"
        tokens = lists_of(batch.column(names.input_ids), 1, np.int32, f"{where}, {names.input_ids}")
        rows = [
            _row(layout, batch, number, tokens.row(number), f"{path}, row {first + number}")
            for number in range(batch.num_rows)
        ]
        if layout.targets is not None:
            layout.targets.open(batch, where)
        for number, (row, keep) in enumerate(rows):
            if len(row) < 2:
                continue
            if layout.targets is None:
                yield row
                continue
            found = layout.targets.row(number, tokens.row(number), keep, row.where)
            found.label_logprobs_T[len(row) - 1 :] = np.nan  # the token after the last one is another row's, or padding
            yield replace(row, targets=found)
        first += batch.num_rows


def _row(
    layout: Layout, batch: pa.RecordBatch, number: int, tokens_M: IntArray, where: str
) -> tuple[CapturedRow, slice]:
    """Return the row without targets and padding, and the slice of its tokens that are not padding."""
    keep = unpadded(layout.columns, batch, number, len(tokens_M), where)
    own_M = tokens_M[keep]  # padding may be any number
    _require_no_null(own_M, where, layout.columns.input_ids)
    if own_M.size and (own_M.min() < 0 or own_M.max() >= layout.vocab_size):
        raise InputError(
            "a token outside the vocabulary",
            where=where,
            found=f"{own_M.min()} to {own_M.max()}",
            expected=f"0 to {layout.vocab_size - 1}, the tokenizer's",
            fix="name the tokenizer of the teacher that made the captures",
        )
    mask_M = _label_mask(layout.columns, batch, number, tokens_M, keep, where)
    starts_M = marks_of(layout.columns.starts, batch, number, len(tokens_M), where, keep)
    if starts_M is None:
        starts_M = np.zeros(len(tokens_M), np.bool_)
        starts_M[keep.start : keep.start + 1] = True
    if layout.end_padding is not None and own_M[-1:] == [layout.end_padding]:
        mask_M[keep.stop - 1] = False
    mask_M, starts_M = mask_M[keep].copy(), starts_M[keep]
    if len(own_M):
        places_D = np.union1d(np.flatnonzero(starts_M), [0])
        begun_D = places_D[begins_with(own_M, places_D, layout.bos_ids)]
        mask_M[(begun_D[:, None] + np.arange(len(layout.bos_ids))).ravel()] = False
    return CapturedRow(where, own_M.astype(np.int32, copy=False), starts_M, mask_M), keep


def _label_mask(
    names: ColumnNames, batch: pa.RecordBatch, number: int, tokens_M: IntArray, keep: slice, where: str
) -> BoolArray:
    mask_M = marks_of(names.loss_mask, batch, number, len(tokens_M), where, keep)
    if mask_M is not None:
        return mask_M
    labels = _lists(names.labels, batch, where)
    if labels is None:
        return np.ones(len(tokens_M), np.bool_)
    labels_M = labels.row(number)
    if len(labels_M) != len(tokens_M) or ((labels_M != IGNORED_LABEL) & (labels_M != tokens_M))[keep].any():
        raise InputError(
            "labels that are not the row's own tokens",
            where=f"{where}, {names.labels}",
            found=f"{len(labels_M)} labels for {len(tokens_M)} tokens, or others than these",
            expected=f"of each token itself, or {IGNORED_LABEL} where it does not count; not shifted",
            fix="name another column with --columns.labels or --columns.loss_mask",
        )
    mask: BoolArray = labels_M != IGNORED_LABEL
    return mask


def unpadded(names: ColumnNames, batch: pa.RecordBatch, number: int, num_tokens: int, where: str) -> slice:
    """Return the slice of a row's tokens that are not padding.

    Raises:
        InputError: There is padding within the row, or the row has not as many marks as tokens.
    """
    attention_M = marks_of(names.attention_mask, batch, number, num_tokens, where)
    if attention_M is None or attention_M.all():
        return slice(0, num_tokens)
    kept = np.flatnonzero(attention_M)
    if not len(kept):
        return slice(0, 0)
    first, last = int(kept[0]), int(kept[-1])
    if len(kept) != last - first + 1:
        raise InputError(
            "padding within a row", where=where, found=f"{last - first + 1 - len(kept)} tokens", expected="at its ends"
        )
    return slice(first, last + 1)


def marks_of(
    name: str, batch: pa.RecordBatch, number: int, num_tokens: int, where: str, keep: slice = slice(None)
) -> BoolArray | None:
    """Return where a row is marked, or None where the column does not exist; marks outside `keep` are not checked.

    Raises:
        InputError: The row has not as many marks as tokens, or a mark is null.
    """
    lists = _lists(name, batch, where)
    if lists is None:
        return None
    values = lists.row(number)
    if len(values) != num_tokens:
        raise InputError(
            "not as many marks as tokens", where=f"{where}, {name}", found=len(values), expected=num_tokens
        )
    _require_no_null(values[keep], where, name)
    marks: BoolArray = values != 0
    return marks


def _require_no_null(values_M: npt.NDArray[Any], where: str, name: str) -> None:
    is_null_M = values_M == NULL
    if is_null_M.any():
        raise InputError(
            "null where a number must be",
            where=f"{where}, {name}",
            found=f"{int(is_null_M.sum())} of {len(values_M)}, the first at {int(np.flatnonzero(is_null_M)[0])}",
            expected="numbers; null in padding alone, where attention_mask is 0",
        )


def _lists(name: str, batch: pa.RecordBatch, where: str) -> Ragged | None:
    if name not in batch.schema.names:
        return None
    return lists_of(batch.column(name), 1, np.int32, f"{where}, {name}")


def targets_of(keep: slice, num_targets: int, num_tokens: int, where: str) -> slice:
    """Return the slice of a row's targets whose tokens are not padding.

    The target after the last token before padding predicts padding, or is empty, so it is left out.

    Raises:
        InputError: There are neither as many targets as tokens, nor one fewer.
    """
    if num_targets not in (num_tokens, num_tokens - 1):
        raise InputError(
            "not a target for each token",
            where=where,
            found=f"{num_targets} targets for {num_tokens} tokens",
            expected=f"{num_tokens}, or {num_tokens - 1} where the last token has none",
            fix="see --offset, which says whether the first target predicts the first token itself",
        )
    return slice(keep.start, min(keep.stop if keep.stop == num_tokens else keep.stop - 1, num_targets))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
