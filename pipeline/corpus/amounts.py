"""Estimates how much text the sources hold and how many tokens it makes, from file sizes and a sample of the text."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import PurePath
from typing import TYPE_CHECKING, BinaryIO

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.files import BUILTIN, places_by_source
from capgap.pipeline.corpus.formats import open_unpacked, records_of
from capgap.pipeline.corpus.kinds import TABLE_SUFFIXES, TEXT_SUFFIXES, Place, is_packed, kind_of
from capgap.pipeline.corpus.places import state_of
from capgap.pipeline.corpus.records import Conversation, fields_read, read_record
from capgap.pipeline.corpus.sources import read_documents
from capgap.pipeline.corpus.tables import num_rows, table_rows
from capgap.schemas.errors import BadRecordError
from capgap.schemas.plan import Figure
from capgap.schemas.run_corpus import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The sample is the first records of three files of each kind.
_SAMPLED_FILES, _SAMPLED_RECORDS = 3, 200
_SAMPLED_TEXT_BYTES = 1 << 20
# large enough that the bytes which readers buffer ahead are a small part of it
_SAMPLED_FILE_BYTES = 1 << 22


def text_bytes(
    places: Sequence[Place], text_field: str, messages_field: str | None = None, skips: bool = False
) -> Figure:
    """Estimate the UTF-8 bytes of text in files and the builtin text; a conversation counts as its JSON.

    Args:
        places: paths and URLs of the files, and `BUILTIN` for the builtin text.
        text_field: the field of a record that holds its text.
        messages_field: the field of a record that holds a conversation, or `auto`; None if records are texts.
        skips: whether records that cannot be used are skipped.

    Raises:
        InputError: a file is missing, or a record has no text and `skips` is false.
    """
    total, how = 0.0, []
    if BUILTIN in places:
        num_bytes = sum(len(document.text.encode()) for document in read_documents((BUILTIN,), ""))
        total += num_bytes
        how.append(f"{num_bytes:,} bytes of {BUILTIN}, counted")
    by_kind: dict[str, list[Place]] = defaultdict(list)
    for path in (place for place in places if place != BUILTIN):
        suffixes = PurePath(str(path)).suffixes
        by_kind["".join(suffixes[-2 if is_packed(path) else -1 :])].append(path)
    for kind, paths in by_kind.items():
        size = sum(state_of(path)[0] for path in paths)
        share = _share_of_text(paths, text_field, messages_field, skips)
        total += size * share
        how.append(
            f"{len(paths)} {kind} of {size:,} bytes"
            + ("" if share == 1 else f", {share:.2f} bytes of text per byte, by a sample")
        )
    return Figure(value=total, source=", ".join(how) or "all its files are counted already")


def source_texts(settings: CorpusSettings) -> tuple[list[Figure], list[float]]:
    """Estimate the bytes of text of each source, and the share of it, from 0 to 1, that is taken by its weight.

    Raises:
        InputError: a source names nothing, a file of an unknown kind, or one that cannot be read; or two sources of a
            mixture name the same text.
        MachineError: the client for a URL is not installed.
    """
    skips = settings.on_bad_record == "skip"
    sources = [source for _, source in settings.named_sources]
    texts = [
        text_bytes(places, source.text_field or settings.text_field, settings.messages_field, skips)
        for source, places in zip(sources, places_by_source(settings), strict=True)
    ]
    weighed = [
        None if source.weight is None else max(text.value or 0.0, 1.0) / source.weight
        for source, text in zip(sources, texts, strict=True)
    ]
    least = min((one for one in weighed if one is not None), default=1.0)
    return texts, [1.0 if one is None else least / one for one in weighed]


def bytes_per_token(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[tuple[tuple[str, ...], str]],
    messages_field: str | None = None,
    num_around: int = 1,
    skips: bool = False,
) -> Figure:
    """Measure the UTF-8 bytes of text per token on about a megabyte from the beginnings of the sources.

    Args:
        tokenizer: the tokenizer that encodes the sample.
        sources: for each source its files, folders and patterns, and the field of its text.
        messages_field: the field of a record that holds a conversation, or `auto`; None if records are texts.
        num_around: number of ids that are added at the beginning and the end of a document.
        skips: whether records that cannot be used are skipped.

    Raises:
        InputError: a file is missing, of an unknown kind or damaged, or a record cannot be used.
    """
    texts: list[str] = []
    num_bytes = 0
    for number, (paths, text_field) in enumerate(sources, start=1):
        most = _SAMPLED_TEXT_BYTES * number // len(sources)
        for document in read_documents(paths, text_field, messages_field, _bad(skips)):
            texts.append(document.text[:_SAMPLED_TEXT_BYTES])
            num_bytes += len(texts[-1].encode())
            if num_bytes >= most:
                break
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    num_tokens = sum(len(ids) + num_around for ids in encoded)
    value = num_bytes / max(num_tokens, 1)
    return Figure(value=value, source=f"{value:.2f} bytes of text per token, by the tokenizer on {num_bytes:,} bytes")


def _bad(skips: bool) -> BadRecords:
    """Return a handler of bad records that logs nothing, because the corpus stage itself logs what it skips."""
    return BadRecords("corpus", "skip" if skips else "stop", 1.0, 0)


def _share_of_text(paths: list[Place], text_field: str, messages_field: str | None, skips: bool) -> float:
    """Estimate the bytes of text per byte of file, for files of one kind; 1 if the file is the text."""
    if all(kind_of(path) in TEXT_SUFFIXES and not is_packed(path) for path in paths):
        return 1.0
    measure = _text_of_rows if kind_of(paths[0]) in TABLE_SUFFIXES else _text_of_stream
    sample = paths[:: max(len(paths) // _SAMPLED_FILES, 1)][:_SAMPLED_FILES]
    return _mean(measure(path, text_field, messages_field, skips) for path in sample)


def _mean(pairs: Iterable[tuple[float, float]]) -> float:
    found = list(pairs)
    return sum(text for text, _ in found) / max(sum(size for _, size in found), 1)


def _text_of_stream(path: Place, text_field: str, messages_field: str | None, skips: bool) -> tuple[float, float]:
    """Return the bytes of text in the first records, and the bytes that these records take in the file.

    In a compressed file, the second number assumes that the records compress as well as the whole sample.
    """
    kind, num_text_bytes = kind_of(path), 0
    with open_unpacked(path) as (stream, raw):
        counted = _Counted(stream)
        fields = fields_read(text_field, messages_field)
        for where, record in records_of(io.BufferedReader(counted), kind, str(path), fields):
            try:
                if isinstance(record, BadRecordError):
                    raise record
                is_text = isinstance(record, str) and kind in TEXT_SUFFIXES
                found = str(record) if is_text else read_record(where, record, text_field, messages_field)
            except BadRecordError:
                if not skips:
                    raise
                continue
            num_text_bytes += _num_bytes(found)
            if counted.num_read >= _SAMPLED_FILE_BYTES:
                break
        num_inflated = counted.num_read + len(stream.read(_SAMPLED_FILE_BYTES))
        compressed = raw.tell() / max(num_inflated, 1)
    return num_text_bytes, counted.num_read * compressed


def _text_of_rows(path: Place, text_field: str, messages_field: str | None, skips: bool) -> tuple[float, float]:
    """Estimate the bytes of text of a table from its first rows, and return them with the size of the file in bytes."""
    total, part = num_rows(path), 0
    bad, sampled = _bad(skips), 0
    # rows without text, which are no documents, count as rows
    for where, row in islice(table_rows(path, fields_read(text_field, messages_field)), _SAMPLED_RECORDS):
        part += 1
        try:
            sampled += _num_bytes(read_record(where, row, text_field, messages_field))
        except BadRecordError as error:
            bad.refuse(error)
    return sampled * total / max(part, 1), state_of(path)[0]


def _num_bytes(found: str | Conversation) -> int:
    text = found.said if isinstance(found, Conversation) else found
    return len(text.encode()) if text.strip() else 0


class _Counted(io.RawIOBase):
    """A stream that counts the bytes that were read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.num_read, self._stream = 0, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.num_read += len(data)
        return len(data)
