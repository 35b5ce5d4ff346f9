"""Documents from files, records and the text that every CPython carries."""

from __future__ import annotations

import glob
import io
import json
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from capgap.schemas.errors import InputError

BUILTIN = "builtin:python"
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
_SUFFIXES = (*_TEXT_SUFFIXES, ".jsonl", ".jsonl.zst", ".parquet")
# A string in JSON may hold one; a pair is joined by the parser.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# Left out of the builtin text: what a distribution may package apart, so that every Debian has the same documents,
# and tables of characters, which are no text.
_NOT_EVERYWHERE = {
    "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv",
    "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "config",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def read_documents(sources: tuple[str, ...], text_field: str) -> Iterator[Document]:
    """Every document of every source, in a fixed order; empty ones are left out.

    Raises:
        InputError: a file is missing, of an unknown kind, not UTF-8, damaged, or a record without text.
    """
    for source in sources:
        documents = _builtin() if source == BUILTIN else _from_paths(source, text_field)
        yield from (document for document in documents if document.text.strip())


def list_files(sources: tuple[str, ...]) -> list[Path]:
    """The files that these sources name, in the order in which they are read; builtin text is none.

    Raises:
        InputError: a source names nothing, or a file of an unknown kind.
    """
    return [path for source in sources if source != BUILTIN for path in _expand(source)]


def _builtin() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"{BUILTIN}/topics/{name}", text)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _NOT_EVERYWHERE.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield Document(f"{BUILTIN}/{relative.as_posix()}", _decode(str(path), path.read_bytes()))


def _from_paths(source: str, text_field: str) -> Iterator[Document]:
    for path in _expand(source):
        if path.suffix in _TEXT_SUFFIXES:
            yield Document(str(path), _decode(str(path), path.read_bytes()))
        elif path.name.endswith((".jsonl", ".jsonl.zst")):
            yield from _records(path, text_field)
        else:
            yield from _rows(path, text_field)


def _expand(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name.endswith(_SUFFIXES)]
        expected = f"files ending in {' '.join(_SUFFIXES)}"
    elif glob.has_magic(source):
        found = [Path(p) for p in sorted(glob.glob(source, recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (an absolute pattern)
        expected = "at least one matching file"
    else:
        found = [path] if path.is_file() else []
        expected = f"a file, a folder, a glob or {BUILTIN}"
    if not found:
        raise InputError("no text found", where=f"corpus.sources: {source}", found="nothing", expected=expected)
    for file in found:
        if not file.name.endswith(_SUFFIXES):
            raise InputError(
                "unknown kind of file",
                where=f"corpus.sources: {file}",
                found=file.suffix or "no suffix",
                expected=" ".join(_SUFFIXES),
            )
    return found


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "not valid UTF-8",
            where=f"corpus.sources: {where}, byte {error.start}",
            found=f"0x{data[error.start]:02x}",
            expected="UTF-8",
            fix="convert the file, for example with `iconv -t utf-8`",
        ) from None


def _records(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield Document(where, _field(where, _parse(where, _decode(where, line)), text_field))


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix != ".zst":
        with path.open("rb") as file:
            yield from file
        return
    try:
        # Arrow's stream, unlike zstandard's reader, says when a file ends within a frame
        with pa.input_stream(str(path), compression="zstd") as stream:
            yield from io.BufferedReader(stream)
    except OSError as error:
        raise InputError("cannot be decompressed", where=f"corpus.sources: {path}", found=error) from None


def _parse(where: str, line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError("not a JSON record", where=f"corpus.sources: {where}", found=error, expected="JSON") from None


def _field(where: str, record: object, text_field: str) -> str:
    value = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        fields = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"no text in field {text_field!r}",
            where=f"corpus.sources: {where}",
            found=f"fields {fields}",
            expected=f"a string in {text_field!r}",
            fix="set corpus.text_field",
        )
    if half := _LONE_SURROGATE.search(value):
        raise InputError(
            "the text holds half of a surrogate pair, which UTF-8 cannot say",
            where=f"corpus.sources: {where}",
            found=ascii(half[0]),
            expected="text",
            fix="repair or remove the record",
        )
    return value


def _rows(path: Path, text_field: str) -> Iterator[Document]:
    try:
        file = pa.parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError("not a Parquet file", where=f"corpus.sources: {path}", found=error) from None
    if text_field not in file.schema_arrow.names:
        raise InputError(
            f"no column {text_field!r}",
            where=f"corpus.sources: {path}",
            found=", ".join(file.schema_arrow.names),
            expected=text_field,
            fix="set corpus.text_field",
        )
    number = 0
    for batch in file.iter_batches(columns=[text_field]):
        for value in batch.column(0).to_pylist():
            yield Document(f"{path}#{number}", _field(f"{path}#{number}", {text_field: value}, text_field))
            number += 1
