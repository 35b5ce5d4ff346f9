"""Reads rows of separated values as records, whose fields are named by the first row that is not empty.

Values separated by commas follow RFC 4180: a quoted value may hold commas, line breaks, and quotes written twice. Files
with tabs are written with such quotes or without any, and no file says which. So quotes around a whole value are
removed, and any other quote is an ordinary character. A quote that opens a value and is not closed in its line begins a
value over several lines, unless the next line is a row by itself: the row is then refused, because it is ambiguous.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

from capgap.pipeline.corpus.encodings import not_utf8
from capgap.pipeline.corpus.tables import require_columns
from capgap.pipeline.corpus.turns import SKIP
from capgap.schemas.errors import BadRecordError, InputError

_OTHER_SEPARATORS = (";", "\t", "|", ",")
_OPEN = re.compile(r'"[^"]*(?:""[^"]*)*')
_QUOTED = re.compile(f'{_OPEN.pattern}"')

_Row = list[str] | BadRecordError


def separated_values(
    stream: BinaryIO, name: str, separator: str, fields: tuple[str, ...]
) -> Iterator[tuple[str, object]]:
    """Yield each row with its place; a row whose number of fields differs from the first row is a BadRecordError.

    Args:
        stream: the bytes of the file, in UTF-8.
        name: the file's name, for places and errors.
        separator: the character between values: a comma or a tab.
        fields: the wanted names, of which the first row must have at least one.

    Raises:
        InputError: the file is no UTF-8, a quote stays open, or the first row has none of the wanted names.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows = _between_tabs(text, name) if separator == "\t" else _between(text, separator)
    header: list[str] | None = None
    line = 0
    try:
        for line, row in rows:
            where = f"{name}:{line}"
            if isinstance(row, BadRecordError):
                yield where, row
            elif header is None:
                if any(value.strip() for value in row):
                    header = row
                    _require_header(header, where, name, separator, fields)
            elif row and len(row) != len(header):
                yield (
                    where,
                    BadRecordError(
                        "the row's fields do not match the header",
                        where=where,
                        found=f"{len(row)} fields",
                        expected=len(header),
                    ),
                )
            elif row:
                record: dict[str, Any] = dict(zip(header, row, strict=True))
                yield where, record
    except UnicodeDecodeError as error:
        raise not_utf8(error, f"{name}:{line + 1}", InputError) from None
    except csv.Error as error:
        raise InputError(
            "cannot be read as separated values",
            where=f"{name}:{line + 1}",
            found=error,
            expected="a closing quote for every opening quote",
            fix="mend the file, or write it as JSONL",
        ) from None
    finally:
        text.detach()


def _between(lines: Iterator[str], separator: str) -> Iterator[tuple[int, _Row]]:
    """Yield each row with the number of its last line, read with the quotes of RFC 4180."""
    rows = csv.reader(lines, delimiter=separator, strict=True)
    for row in rows:
        yield rows.line_num, row


def _between_tabs(lines: Iterator[str], name: str) -> Iterator[tuple[int, _Row]]:
    """Yield each row with the number of its last line, read as values between tabs, or an error if it is ambiguous."""
    number = num_values = 0
    following = next(lines, None)
    while following is not None:
        line, following = following, next(lines, None)
        number += 1
        values = _split(line)
        row: _Row
        if any(map(_OPEN.fullmatch, values)):
            if following is not None and len(values) == num_values == len(_split(following)):
                row = _open_quote(f"{name}:{number}", values)
            else:
                reader = csv.reader(chain([line, following or ""], lines), delimiter="\t", strict=True)
                row = next(reader)
                if reader.line_num > 1:
                    number += reader.line_num - 1
                    following = next(lines, None)
        else:
            row = [_unquoted(value) for value in values]
        if isinstance(row, list):
            num_values = num_values or (len(row) if any(row) else 0)
        yield number, row


def _split(line: str) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split("\t") if line else []


def _unquoted(value: str) -> str:
    return value if _QUOTED.fullmatch(value) is None else value[1:-1].replace('""', '"')


def _open_quote(where: str, values: list[str]) -> BadRecordError:
    return BadRecordError(
        "a value begins with a quote that does not end in its line, and the next line is a row by itself",
        where=where,
        found=ascii(next(value for value in values if _OPEN.fullmatch(value)))[:60],
        expected="a quote at the end of the value as well",
        fix=f"write the file as JSONL, {SKIP}",
    )


def _require_header(header: list[str], where: str, name: str, separator: str, fields: tuple[str, ...]) -> None:
    other = next((one for one in _OTHER_SEPARATORS if one != separator and one in header[0]), None)
    if len(header) == 1 and other is not None:
        raise InputError(
            "the values are separated by another character",
            where=where,
            found=f"{header[0][:60]!a} in the first row",
            expected=f"names with {separator!a} between them",
            fix=f"write it with {separator!a} instead of {other!a}, or as JSONL",
        )
    require_columns(name, header, fields)
