"""Reads the records of a file one after another; only a file that is a single document is held in memory whole.

.txt .md .rst .py          one document                  .json      one list of records, or records one after another
.jsonl .ndjson             one record per line           .csv .tsv  one record per row; the first row names the fields
.parquet .arrow .feather   one record per row            .gz .bz2 .xz .zst may follow any suffix but these three
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, cast

import pyarrow as pa

from capgap.pipeline.corpus.encodings import not_utf8
from capgap.pipeline.corpus.json_values import json_values
from capgap.pipeline.corpus.kinds import LINE_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, Place, kind_of
from capgap.pipeline.corpus.places import open_place
from capgap.pipeline.corpus.separated import separated_values
from capgap.pipeline.corpus.tables import table_rows
from capgap.pipeline.store.pointers import require_no_pointer
from capgap.schemas.errors import BadRecordError, InputError


@dataclass(frozen=True)
class Span:
    """A part of a file that is read by itself: a range of bytes of a file of lines, or of row groups of a Parquet file.

    Attributes:
        start: the first byte of a file of lines, or the first row group of a Parquet file.
        end: the byte or the row group behind the last one. A line belongs to the part that holds its first byte.
        first_row: number of rows before the part, for a Parquet file.
    """

    start: int
    end: int
    first_row: int = 0


Found = tuple[str, object]
"""The place of a record, and the record itself, or the BadRecordError that says why it cannot be read."""

_ALL = Span(0, 1 << 62)
_WHOLE = "if one value spans several lines, give the file the suffix .json"


def read_records(path: Place, fields: tuple[str, ...], span: Span | None = None) -> Iterator[Found]:
    """Yield the records of a file: strings from files of text, and JSON values or rows from all others.

    Args:
        path: the file, of a known kind.
        fields: the columns to read from a table; columns that it does not have are ignored.
        span: the part of an uncompressed file of lines, or of a Parquet file, that is read; None for the whole file.

    Raises:
        InputError: the file cannot be read, is damaged, or ends early.
    """
    kind = kind_of(path)
    if isinstance(path, Path):
        require_no_pointer(path, path)
    if kind in TABLE_SUFFIXES:
        groups = None if span is None else range(span.start, span.end)
        yield from table_rows(path, fields, groups, 0 if span is None else span.first_row)
        return
    with open_unpacked(path) as (stream, _):
        if span is not None and kind in LINE_SUFFIXES:
            yield from _lines(stream, str(path), span)
        else:
            yield from records_of(stream, kind, str(path), fields)


def records_of(stream: BinaryIO, kind: str | None, name: str, fields: tuple[str, ...]) -> Iterator[Found]:
    """Yield the records of an open stream of text.

    Args:
        stream: the uncompressed bytes of the file.
        kind: the suffix that says how the file is read, as `kind_of` returns it.
        name: the file's name, for the places of records and for errors.
        fields: the columns to read from separated values.

    Raises:
        InputError: the stream cannot be read, is damaged, or ends early.
    """
    if kind in TEXT_SUFFIXES:
        try:
            yield name, _decode(name, stream.read())
        except BadRecordError as error:
            yield name, error
    elif kind in LINE_SUFFIXES:
        yield from _lines(stream, name)
    elif kind == ".json":
        yield from json_values(stream, name)
    else:
        yield from separated_values(stream, name, "\t" if kind == ".tsv" else ",", fields)


@contextmanager
def open_unpacked(path: Place) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file, and yield a stream of its decompressed bytes and the stream of the file itself.

    Raises:
        InputError: the file cannot be opened, is damaged, or ends within compressed data.
    """
    suffix = PurePath(str(path)).suffix.lower()
    try:
        with open_place(path) as raw, _unpacked(raw, suffix) as stream:
            yield stream, raw
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError("cannot be read", where=path, found=error.strerror, expected="a file") from None
        how = {".zst": "zstd, as `zstd FILE` writes it", ".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
        raise InputError(
            "cannot be decompressed",
            where=path,
            found=str(error) or type(error).__name__,
            expected=how.get(suffix, "a whole file"),
            fix=f"compress it again, or remove {suffix} from its name if it is not compressed",
        ) from None


@contextmanager
def _unpacked(raw: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """Yield a stream of the decompressed bytes of an open file, whose compression is named by its last suffix."""
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as packed:
            yield cast(BinaryIO, packed)
    elif suffix == ".bz2":
        with bz2.BZ2File(raw) as packed:
            yield cast(BinaryIO, packed)
    elif suffix == ".xz":
        with lzma.LZMAFile(raw) as packed:
            yield cast(BinaryIO, packed)
    elif suffix == ".zst":
        # Arrow's stream, unlike zstandard's reader, raises an error if the file ends within a frame
        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as packed:
            yield cast(BinaryIO, io.BufferedReader(packed))
    else:
        yield raw


def _decode(where: str, data: bytes) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, f"{where}, byte {error.start}", BadRecordError) from None


def _lines(stream: BinaryIO, name: str, span: Span = _ALL) -> Iterator[Found]:
    """Yield the lines that begin within the span.

    Lines are named by number; where the span does not begin at the file's start, by their first byte.
    """
    place = span.start
    if place:
        # the span may begin within a line; the rest of that line belongs to the span before
        stream.seek(place - 1)
        place += len(stream.readline()) - 1
    for number, line in enumerate(stream, start=1):
        if place >= span.end:
            return
        where = f"{name}, byte {place}" if span.start else f"{name}:{number}"
        place += len(line)
        if line.strip():
            try:
                yield where, _parse(where, _decode(where, line))
            except BadRecordError as error:
                yield where, error


def _parse(where: str, line: str) -> object:
    try:
        return json.loads(line)
    except RecursionError:
        found: object = "lists or objects nested more deeply than can be read"
    except ValueError as error:
        found = f"{error} in {line.strip()[:40]!a}"
    raise BadRecordError(
        "not a JSON record", where=where, found=found, expected="one JSON value a line", fix=_WHOLE
    ) from None
