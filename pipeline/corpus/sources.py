"""Reads documents from files of text or records, and from the text that every CPython carries."""

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

# Left out of the builtin text: modules that a distribution may package separately, so that every Debian has the same
# documents, and tables of characters, which are no text.
_NOT_EVERYWHERE = {
    "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv",
    "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "config",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        name: the file, and the record's place in it.
        text: the text; of a conversation, the JSON of what is said in it, by which equal conversations are recognized.
        messages: the whole conversation as JSON; None if the record is a text.
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
    """Yield every document of every source in a fixed order, without empty ones; each file is read once.

    Args:
        sources: files, folders, globs or URLs, or builtin text.
        text_field: the field of a record that holds its text.
        messages_field: the field of a record that holds a conversation, or `auto`; None if records are texts. The
            module `records` lists the forms of a conversation.
        bad: what becomes of records that cannot be used; None stops at the first one.
        section: the section of the run file that names the sources, for errors.

    Raises:
        InputError: a file is missing, of an unknown kind or damaged.
        BadRecordError: a record has no text or messages, and `bad` stops at such a record.
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
    """Yield the documents of one file, or of a part of it, without empty ones.

    Args:
        place: path or URL of the file, or `BUILTIN`.
        span: the part of a file of lines or of Parquet that is read; None for the whole file.
        text_field: the field of a record that holds its text.
        messages_field: the field of a record that holds a conversation, or `auto`; None if records are texts.
        bad: what becomes of records that cannot be used.
        section: the section of the run file that names the file, for errors.

    Raises:
        InputError: the file cannot be read or is damaged.
        BadRecordError: a record has no text or messages, and `bad` stops at such a record.
    """
    found = _builtin() if place == BUILTIN else _from_file(place, span, text_field, messages_field, bad, section)
    yield from (document for document in found if document.text.strip())


def builtin_bytes() -> int:
    """Return the approximate size of the builtin text in bytes."""
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
                # the two are mostly equal, and then one string in memory serves for both
                yield Document(where, whole if said == whole else said, whole)
    except InputError as error:
        raise in_section(error, section) from None
