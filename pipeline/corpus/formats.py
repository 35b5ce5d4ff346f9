"""Files into records, one after another; a file is never held whole, but one that is a document itself.

.txt .md .rst .py          a document                         .json      a list of records, or one after another
.jsonl .ndjson             a record a line                    .csv .tsv  a record a row, named by the first row
.parquet .arrow .feather   a record a row                     .gz .bz2 .xz .zst behind any but these three
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
    """A part of a file that is read alone.

    Attributes:
        start: of lines, a byte: the first line that begins there or later; of Parquet, a row group.
        end: the byte at which, or after which, the first line begins that is no more of it; or the row group.
        first_row: of Parquet, rows before it.
    """

    start: int
    end: int
    first_row: int = 0


Found = tuple[str, object]
"""Where a record stands, and the record, or the BadRecordError that says why it cannot be read."""

_ALL = Span(0, 1 << 62)
_WHOLE = "where one value goes over several lines, call the file .json"


def read_records(path: Place, fields: tuple[str, ...], span: Span | None = None) -> Iterator[Found]:
    """The records of a file: texts of documents, objects of all others.

    Args:
        path: of a known kind.
        fields: of a table, the columns that are wanted, where it has them.
        span: of a file of lines that is not compressed, or of Parquet, the part that is read; all of it where None.

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
    """The records of an open stream of text; see `read_records`."""
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
    """The file's bytes as they were before it was compressed, and the file itself.

    Raises:
        InputError: it cannot be opened, is damaged, or ends within its compression.
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
            fix=f"compress it again, or take {suffix} off a file that is none",
        ) from None


@contextmanager
def _unpacked(raw: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """What an open file holds, before it was compressed as its last suffix says."""
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
        # Arrow's stream, unlike zstandard's reader, says when a file ends within a frame
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
    """Lines that begin within the span; where those before it are not read, a line is named by its first byte."""
    place = span.start
    if place:
        # what stands there may be the rest of a line that begins before
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
