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
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from capgap.pipeline.corpus.encodings import not_utf8
from capgap.pipeline.corpus.json_values import json_values
from capgap.pipeline.corpus.kinds import LINE_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, kind_of
from capgap.pipeline.corpus.separated import separated_values
from capgap.pipeline.corpus.tables import table_rows
from capgap.pipeline.store.pointers import require_no_pointer
from capgap.schemas.errors import BadRecordError, InputError

Found = tuple[str, object]
"""Where a record stands, and the record, or the BadRecordError that says why it cannot be read."""

_WHOLE = "where one value goes over several lines, call the file .json"


def read_records(path: Path, fields: tuple[str, ...]) -> Iterator[Found]:
    """The records of a file: texts of documents, objects of all others.

    Args:
        path: of a known kind.
        fields: of a table, the columns that are wanted, where it has them.

    Raises:
        InputError: the file cannot be read, is damaged, or ends early.
    """
    kind = kind_of(path)
    require_no_pointer(path, path)
    if kind in TABLE_SUFFIXES:
        yield from table_rows(path, fields)
        return
    with open_unpacked(path) as (stream, _):
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
def open_unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's bytes as they were before it was compressed, and the file itself.

    Raises:
        InputError: it cannot be opened, is damaged, or ends within its compression.
    """
    try:
        with path.open("rb") as raw, _unpacked(raw, path.suffix.lower()) as stream:
            yield stream, raw
    except (pa.ArrowException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError("cannot be read", where=path, found=error.strerror, expected="a file") from None
        suffix = path.suffix.lower()
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


def _lines(stream: BinaryIO, name: str) -> Iterator[Found]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            where = f"{name}:{number}"
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
