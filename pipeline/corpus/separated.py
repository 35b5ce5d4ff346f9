"""Rows of separated values, as records named by the first row."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from capgap.pipeline.corpus.encodings import not_utf8
from capgap.pipeline.corpus.tables import require_columns
from capgap.schemas.errors import BadRecordError, InputError

_OTHER_SEPARATORS = (";", "\t", "|", ",")


def separated_values(
    stream: BinaryIO, name: str, separator: str, fields: tuple[str, ...]
) -> Iterator[tuple[str, object]]:
    """Each row with its place; one that has another number of fields than the first is no record.

    Args:
        stream: of UTF-8.
        name: the file.
        separator: of values.
        fields: names that are wanted, of which the first row must have one.

    Raises:
        InputError: it is no UTF-8, a quote stays open, or the first row names nothing that is wanted.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=separator, strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            where = f"{name}:{rows.line_num}"
            if header is None:
                header = row
                _require_header(header, name, separator, fields)
            elif row and len(row) != len(header):
                yield (
                    where,
                    BadRecordError(
                        "the row does not fit the first", where=where, found=f"{len(row)} fields", expected=len(header)
                    ),
                )
            elif row:
                record: dict[str, Any] = dict(zip(header, row, strict=True))
                yield where, record
    except UnicodeDecodeError as error:
        raise not_utf8(error, f"{name}:{rows.line_num + 1}", InputError) from None
    except csv.Error as error:
        raise InputError(
            "cannot be read as separated values",
            where=f"{name}:{rows.line_num + 1}",
            found=error,
            expected="a quote for each that is opened",
            fix="mend the file, or write it as JSONL",
        ) from None
    finally:
        text.detach()


def _require_header(header: list[str], name: str, separator: str, fields: tuple[str, ...]) -> None:
    other = next((one for one in _OTHER_SEPARATORS if one != separator and one in header[0]), None)
    if len(header) == 1 and other is not None:
        raise InputError(
            "the values are separated otherwise",
            where=f"{name}:1",
            found=f"{header[0][:60]!a} in the first row",
            expected=f"names with {separator!a} between them",
            fix=f"write it with {separator!a} instead of {other!a}, or as JSONL",
        )
    require_columns(name, header, fields)
