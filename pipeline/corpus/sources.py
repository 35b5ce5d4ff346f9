"""Documents from files, records and the text that every CPython carries."""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from capgap.pipeline.corpus.bad_records import BadRecords, in_section
from capgap.pipeline.corpus.files import BUILTIN, list_places
from capgap.pipeline.corpus.formats import Span, read_records
from capgap.pipeline.corpus.kinds import TEXT_SUFFIXES, Place, kind_of
from capgap.pipeline.corpus.records import fields_read, read_record
from capgap.schemas.errors import BadRecordError, InputError

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
        text: of a conversation, what is said in it as JSON, by which conversations are told apart.
        messages: all of it as JSON where the record is a conversation, None for text.
    """

    name: str
    text: str
    messages: str | None = None


def read_documents(
    sources: tuple[str, ...],
    text_field: str,
    messages_field: str | None = None,
    bad: BadRecords | None = None,
    section: str = "corpus",
) -> Iterator[Document]:
    """Every document of every source, in a fixed order, of a file that is named twice once; empty ones are left out.

    Args:
        sources: files, folders, globs or URLs, or builtin text.
        text_field: of a record, that holds its text.
        messages_field: of a record, that holds a conversation, or `auto`; records are conversations where it is given,
            see `records`.
        bad: what becomes of records that cannot be used; the first one stops where it is None.
        section: of the run file, for errors.

    Raises:
        InputError: a file is missing, of an unknown kind or damaged.
        BadRecordError: a record without text or messages, if it stops.
    """
    bad = bad or BadRecords(section, "stop", 0.0)
    for place in list_places(sources, section):
        yield from read_documents_of(place, None, text_field, messages_field, bad, section)


def read_documents_of(
    place: Place,
    span: Span | None,
    text_field: str,
    messages_field: str | None,
    bad: BadRecords,
    section: str = "corpus",
) -> Iterator[Document]:
    """The documents of a file, or of a part of it; empty ones are left out. See `read_documents` and `read_records`.

    `BUILTIN` is a file too.
    """
    found = _builtin() if place == BUILTIN else _from_file(place, span, text_field, messages_field, bad, section)
    yield from (document for document in found if document.text.strip())


def builtin_bytes() -> int:
    """About the size of the builtin text."""
    topics = sum(map(len, pydoc_data.topics.topics.values()))
    return topics + sum(path.stat().st_size for _, path in _builtin_files())


def _builtin() -> Iterator[Document]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(f"{BUILTIN}/topics/{name}", text)
    for name, path in _builtin_files():
        yield Document(f"{BUILTIN}/{name}", path.read_text(encoding="utf-8"))


def _builtin_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _NOT_EVERYWHERE.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield relative.as_posix(), path


def _from_file(
    path: Place, span: Span | None, text_field: str, messages_field: str | None, bad: BadRecords, section: str
) -> Iterator[Document]:
    is_text = kind_of(path) in TEXT_SUFFIXES
    try:
        for where, record in read_records(path, fields_read(text_field, messages_field), span):
            bad.num_records += 1
            try:
                if isinstance(record, BadRecordError):
                    raise record
                found = str(record) if is_text else read_record(where, record, text_field, messages_field)
            except BadRecordError as error:
                bad.refuse(error)
                continue
            if isinstance(found, str):
                yield Document(where, found)
            else:
                whole, said = found.to_json(), found.said
                # most are the same, and need be in memory but once
                yield Document(where, whole if said == whole else said, whole)
    except InputError as error:
        raise in_section(error, section) from None
