"""Documents from files, records and the text that every CPython carries."""

from __future__ import annotations

import glob
import io
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

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
    """One text and where it came from.

    Attributes:
        name: file, and record in it.
        text: of a conversation, its messages as JSON.
        messages: the same JSON where the record is a conversation, None for text.
    """

    name: str
    text: str
    messages: str | None = None


def read_documents(sources: tuple[str, ...], text_field: str, messages_field: str | None = None) -> Iterator[Document]:
    """Every document of every source, in a fixed order; empty ones are left out.

    Args:
        sources: files, folders, globs or builtin text.
        text_field: of a record, that holds its text.
        messages_field: of a record, that holds a conversation; records are conversations where it is given. A record
            that is a list is one itself.

    Raises:
        InputError: a file is missing, of an unknown kind, not UTF-8, damaged, or a record without text or messages.
    """
    for source in sources:
        documents = _builtin() if source == BUILTIN else _from_paths(source, text_field, messages_field)
        yield from (document for document in documents if document.text.strip())


def list_files(sources: tuple[str, ...]) -> list[Path]:
    """The files that these sources name, in the order in which they are read; builtin text is none.

    Raises:
        InputError: a source names nothing, or a file of an unknown kind.
    """
    return [path for source in sources if source != BUILTIN for path in _expand(source)]


def _builtin() -> Iterator[Document]:
    import pydoc_data.topics

    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"{BUILTIN}/topics/{name}", text)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _NOT_EVERYWHERE.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield Document(f"{BUILTIN}/{relative.as_posix()}", _decode(str(path), path.read_bytes()))


def _from_paths(source: str, text_field: str, messages_field: str | None) -> Iterator[Document]:
    for path in _expand(source):
        if path.suffix in _TEXT_SUFFIXES:
            yield Document(str(path), _decode(str(path), path.read_bytes()))
        elif path.name.endswith((".jsonl", ".jsonl.zst")):
            yield from (_document(*record, text_field, messages_field) for record in _records(path))
        else:
            rows = _rows(path, messages_field or text_field, "messages_field" if messages_field else "text_field")
            yield from (_document(*row, text_field, messages_field) for row in rows)


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
        fix = "check the path" + ("" if path.is_absolute() else f", from {Path.cwd()}")
        raise InputError(
            "no text found", where=f"corpus.sources: {source}", found="nothing", expected=expected, fix=fix
        )
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


def _document(where: str, record: object, text_field: str, messages_field: str | None) -> Document:
    if messages_field is None:
        return Document(where, _field(where, record, text_field))
    messages = _messages(where, record, messages_field)
    return Document(where, messages, messages)


def _records(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parse(where, _decode(where, line))


def _lines(path: Path) -> Iterator[bytes]:
    if path.suffix != ".zst":
        with path.open("rb") as file:
            yield from file
        return
    # here and below: to list files asks for no Arrow
    import pyarrow as pa

    try:
        # Arrow's stream, unlike zstandard's reader, says when a file ends within a frame
        with pa.input_stream(str(path), compression="zstd") as stream:
            yield from io.BufferedReader(stream)
    except OSError as error:
        raise InputError(
            "cannot be decompressed",
            where=f"corpus.sources: {path}",
            found=error,
            expected="zstd, as `zstd FILE` writes it",
            fix="compress it again, or take .zst off a file that is none",
        ) from None


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
    _require_text(where, value)
    return value


def _messages(where: str, record: object, field: str) -> str:
    """A conversation as JSON, the same for the same messages."""
    value = _as_messages(record.get(field) if isinstance(record, dict) else record)
    if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
        fields = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(
            f"no messages in field {field!r}",
            where=f"corpus.sources: {where}",
            found=f"fields {fields}" if value is None else ascii(value)[:80],
            expected='a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
            fix="set corpus.messages_field, or leave it out for plain text",
        )
    # a table fills up what a message does not have
    messages = [{name: part for name, part in message.items() if part is not None} for message in value]
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True, default=str)
    _require_text(where, text)
    return text


def _as_messages(value: object) -> object:
    """Lists of turns as lists of messages; anything else as it is.

    Texts in turn, the user's first, or the question and answer of each turn, as MiniChat's data has them.
    """
    if not isinstance(value, list) or not value:
        return value
    if all(isinstance(turn, str) for turn in value):
        return [
            {"role": role, "content": text} for role, text in zip(cycle(("user", "assistant")), value, strict=False)
        ]
    if all(isinstance(turn, dict) and turn.keys() == {"User", "Assistant"} for turn in value):
        return [{"role": role.lower(), "content": turn[role]} for turn in value for role in ("User", "Assistant")]
    return value


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _require_text(where: str, value: str) -> None:
    if half := _LONE_SURROGATE.search(value):
        raise InputError(
            "the text holds half of a surrogate pair, which UTF-8 cannot say",
            where=f"corpus.sources: {where}",
            found=ascii(half[0]),
            expected="text",
            fix="repair or remove the record",
        )


def _rows(path: Path, field: str, setting: str) -> Iterator[tuple[str, object]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(
            "not a Parquet file",
            where=f"corpus.sources: {path}",
            found=error,
            expected="Parquet",
            fix="write it again, or take it out of the sources",
        ) from None
    if field not in file.schema_arrow.names:
        raise InputError(
            f"no column {field!r}",
            where=f"corpus.sources: {path}",
            found=", ".join(file.schema_arrow.names),
            expected=field,
            fix=f"set corpus.{setting}",
        )
    number = 0
    for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0).to_pylist():
            yield f"{path}#{number}", {field: value}
            number += 1
