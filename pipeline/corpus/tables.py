"""Reads the wanted columns of Parquet and Arrow files, one batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from capgap.pipeline.corpus.kinds import Place, kind_of
from capgap.pipeline.corpus.places import open_place
from capgap.pipeline.store.pointers import require_no_pointer
from capgap.schemas.errors import InputError

_BATCH_ROWS = 1024
_ARROW_MAGIC = b"ARROW1"


def table_rows(
    path: Place, fields: tuple[str, ...], groups: range | None = None, first_row: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place, as a dictionary of the wanted columns.

    Args:
        path: a .parquet, .arrow or .feather file.
        fields: the wanted columns, of which the file must have at least one.
        groups: the row groups of a Parquet file that are read; None for all.
        first_row: number of rows before these groups, from which rows are counted.

    Raises:
        InputError: the file is no such table, is damaged, or has none of the wanted columns.
    """
    kind = _kind(path)
    number = first_row
    with _damage_named(path, kind), _opened(path) as source:
        batches = _parquet_batches(path, source, fields, groups) if kind == "Parquet" else _arrow(path, source, fields)
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{path}#{number}", {name: _without_filling(value) for name, value in row.items()}
                number += 1


def num_rows(path: Place) -> int:
    """Return the number of rows of a .parquet, .arrow or .feather file.

    Raises:
        InputError: the file is no such table, or is damaged.
    """
    kind = _kind(path)
    with _damage_named(path, kind), _opened(path) as source:
        if kind == "Parquet":
            return int(pa.parquet.read_metadata(source).num_rows)
        return sum(batch.num_rows for batch in _open_arrow(source)[1])


def row_groups(path: Place, fields: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return the number of rows of each row group of a Parquet file, and the bytes of its wanted columns, uncompressed.

    Raises:
        InputError: the file is no Parquet file, or is damaged.
    """
    if isinstance(path, Path):
        require_no_pointer(path, path)
    with _damage_named(path, "Parquet"), _opened(path) as source:
        found = pa.parquet.read_metadata(source)
        groups = (found.row_group(number) for number in range(found.num_row_groups))
        return [(group.num_rows, _wanted_bytes(group, fields)) for group in groups]


def _wanted_bytes(group: Any, fields: tuple[str, ...]) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema.split(".")[0] in fields)


def _kind(path: Place) -> str:
    return "Parquet" if kind_of(path) == ".parquet" else "Arrow"


@contextmanager
def _opened(path: Place) -> Iterator[Any]:
    if isinstance(path, Path):
        # Parquet files are not mapped, because mapped pages would count as memory of this process
        with pa.OSFile(str(path)) if _kind(path) == "Parquet" else pa.memory_map(str(path)) as source:
            yield source
    else:
        with open_place(path) as stream:
            yield pa.PythonFile(stream, mode="r")


def _parquet_batches(path: Place, source: Any, fields: tuple[str, ...], groups: range | None) -> Iterator[Any]:
    with pa.parquet.ParquetFile(source, page_checksum_verification=True) as file:
        columns = require_columns(path, file.schema_arrow.names, fields)
        wanted = range(file.num_row_groups) if groups is None else groups
        # one row group per call: a call with several groups holds all that it has read of them in memory
        for group in wanted:
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, row_groups=[group])


def _arrow(path: Place, source: Any, fields: tuple[str, ...]) -> Iterator[Any]:
    names, batches = _open_arrow(source)
    columns = require_columns(path, names, fields)
    for batch in batches:
        wanted = batch.select(columns)
        wanted.validate(full=True)
        for start in range(0, len(wanted), _BATCH_ROWS):
            yield wanted.slice(start, _BATCH_ROWS)


def _open_arrow(source: Any) -> tuple[list[str], Iterator[Any]]:
    """Return the column names and the batches of an Arrow file (as Feather is one) or stream (as `datasets` writes)."""
    if source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC:
        file = pa.ipc.open_file(source)
        return file.schema.names, (file.get_batch(number) for number in range(file.num_record_batches))
    source.seek(0)
    stream = pa.ipc.open_stream(source)
    return stream.schema.names, iter(stream)


def require_columns(path: Place, names: list[str], fields: tuple[str, ...]) -> list[str]:
    """Return the wanted columns that the file has, in the file's order.

    Args:
        path: the file, for errors.
        names: the names of its columns.
        fields: the wanted columns.

    Raises:
        InputError: the file has none of the wanted columns, or two columns of the same wanted name.
    """
    found = [name for name in dict.fromkeys(names) if name in fields]
    double = next((name for name in found if names.count(name) > 1), None)
    if double is not None:
        raise InputError(
            f"{names.count(double)} columns are called {double!r}", where=path, expected="one", fix="rename the others"
        )
    if not found:
        raise InputError(
            f"no column {fields[0]!r}" if len(fields) == 1 else "no column of a conversation",
            where=path,
            found=", ".join(names)[:200],
            expected=fields[0] if len(fields) == 1 else f"one of {', '.join(fields)}",
            fix=f"set corpus.{'text_field' if len(fields) == 1 else 'messages_field'}",
        )
    return found


def _without_filling(value: Any) -> Any:
    """Return the value without null fields in its objects, because a column gives each row the fields of all rows."""
    if isinstance(value, dict):
        return {name: _without_filling(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_filling(part) for part in value]
    return value


@contextmanager
def _damage_named(path: Place, kind: str) -> Iterator[None]:
    """Turn every error by which the reader reports damage into one InputError."""
    try:
        yield
    except InputError:
        raise
    # Arrow reports a damaged page as any of these errors, also as a length that exceeds the memory
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, EOFError, KeyError) as error:
        raise InputError(
            f"not {'a' if kind == 'Parquet' else 'an'} {kind} file, or a damaged one",
            where=path,
            found=(str(error) or type(error).__name__)[:200],
            expected=kind,
            fix="write it again, or take it out of the sources",
        ) from None
