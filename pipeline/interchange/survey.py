"""What must be known of captures before they are imported: how long their rows are, and where documents begin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from capgap.pipeline.interchange.parquet import batches_of, marks_of, open_file, require_columns, unpadded
from capgap.pipeline.interchange.ragged import lists_of
from capgap.schemas.interchange import ColumnNames


def longest_row(path: Path, columns: ColumnNames) -> int:
    """Return the number of tokens in a file's longest row, without padding; 0 where the file has no rows.

    Raises:
        InputError: The file is damaged, a column is missing or of another kind, or there is padding within a row.
    """
    return max((keep.stop - keep.start for _, keep, _ in _rows(path, columns, with_starts=False)), default=0)


def start_within(path: Path, columns: ColumnNames) -> str | None:
    """Return the first row and token at which a document begins after the row's first token; None where none does.

    Raises:
        InputError: The file is damaged, a column is missing or of another kind, or there is padding within a row.
    """
    for where, _, starts in _rows(path, columns, with_starts=True):
        if len(starts):
            return f"{where}, token {starts[0]}"
    return None


def _rows(path: Path, columns: ColumnNames, with_starts: bool) -> Iterator[tuple[str, slice, list[int]]]:
    """Yield each row's name, the slice of tokens that are not padding, and the later tokens that begin a document."""
    file = open_file(path)
    require_columns(file, path, (columns.input_ids,))
    there = file.schema_arrow.names
    if with_starts and columns.starts not in there:
        return
    wanted = (columns.attention_mask, *([columns.starts] if with_starts else ()))
    first = 0
    for batch in batches_of(file, path, [columns.input_ids, *(name for name in wanted if name in there)]):
        sizes_R = lists_of(batch.column(columns.input_ids), 1, np.int32, f"{path}, {columns.input_ids}").sizes_R
        for number, size in enumerate(sizes_R.tolist()):
            where = f"{path}, row {first + number}"
            keep = unpadded(columns, batch, number, size, where)
            starts_M = marks_of(columns.starts, batch, number, size, where, keep) if with_starts else None
            within = [] if starts_M is None else (np.flatnonzero(starts_M[keep][1:]) + keep.start + 1).tolist()
            yield where, keep, within
        first += batch.num_rows
