"""Rows of Parquet and Arrow files, a batch at a time, of the columns that are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from capgap.schemas.errors import InputError

_BATCH_ROWS = 1024
_ARROW_MAGIC = b"ARROW1"


def table_rows(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place, as an object of the wanted columns.

    Args:
        path: a .parquet, .arrow or .feather file.
        fields: columns that are wanted; the first must be there where it is the only one.

    Raises:
        InputError: it is none, it is damaged, or has no column that is wanted.
    """
    kind = _kind(path)
    number = 0
    with _damage_named(path, kind):
        for batch in (_parquet_batches if kind == "Parquet" else _arrow_batches)(path, fields):
            for row in batch.to_pylist():
                yield f"{path}#{number}", {name: _without_filling(value) for name, value in row.items()}
                number += 1


def num_rows(path: Path) -> int:
    """Rows of a .parquet, .arrow or .feather file.

    Raises:
        InputError: as `table_rows`.
    """
    kind = _kind(path)
    with _damage_named(path, kind):
        if kind == "Parquet":
            return int(pa.parquet.read_metadata(path).num_rows)
        with pa.memory_map(str(path)) as source:
            return sum(batch.num_rows for batch in _open_arrow(source)[1])


def _kind(path: Path) -> str:
    return "Parquet" if path.suffix.lower() == ".parquet" else "Arrow"


def _parquet_batches(path: Path, fields: tuple[str, ...]) -> Iterator[Any]:
    with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        columns = require_columns(path, file.schema_arrow.names, fields)
        yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)


def _arrow_batches(path: Path, fields: tuple[str, ...]) -> Iterator[Any]:
    with pa.memory_map(str(path)) as source:
        names, batches = _open_arrow(source)
        columns = require_columns(path, names, fields)
        for batch in batches:
            wanted = batch.select(columns)
            wanted.validate(full=True)
            for start in range(0, len(wanted), _BATCH_ROWS):
                yield wanted.slice(start, _BATCH_ROWS)


def _open_arrow(source: Any) -> tuple[list[str], Iterator[Any]]:
    """Columns and batches of a file with an index, as Feather has it, or of a stream, as `datasets` writes it."""
    if source.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC:
        file = pa.ipc.open_file(source)
        return file.schema.names, (file.get_batch(number) for number in range(file.num_record_batches))
    source.seek(0)
    stream = pa.ipc.open_stream(source)
    return stream.schema.names, iter(stream)


def require_columns(path: str | Path, names: list[str], fields: tuple[str, ...]) -> list[str]:
    """The columns that are wanted, of those of a file.

    Raises:
        InputError: it has none of them, or two of one name.
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


def _without_filling(value: Any, within: bool = False) -> Any:
    """Objects without the fields that a column has for the sake of other rows."""
    if isinstance(value, dict):
        return {name: _without_filling(part, True) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_filling(part, True) for part in value]
    return value


@contextmanager
def _damage_named(path: Path, kind: str) -> Iterator[None]:
    """Damage in whatever form the reader reports it."""
    try:
        yield
    except InputError:
        raise
    # Arrow reports a damaged page as any of these, also as a length that no memory holds
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, EOFError, KeyError) as error:
        raise InputError(
            f"not {'a' if kind == 'Parquet' else 'an'} {kind} file, or a damaged one",
            where=path,
            found=(str(error) or type(error).__name__)[:200],
            expected=kind,
            fix="write it again, or take it out of the sources",
        ) from None
