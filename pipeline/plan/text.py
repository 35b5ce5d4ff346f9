"""How much text there is and how many tokens it makes, by the sizes of files and a sample of what they hold."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.corpus.sources import BUILTIN, list_files, read_documents
from capgap.schemas.plan import Figure

# Of each kind of file three are looked into, and of each the first records.
_SAMPLED_FILES, _SAMPLED_RECORDS = 3, 200
_SAMPLED_TEXT_BYTES = 1 << 20
_INFLATED_BYTES = 1 << 22


def text_bytes(sources: tuple[str, ...], text_field: str) -> Figure:
    """UTF-8 bytes of text in the sources.

    Raises:
        InputError: a source is missing, or a record without text.
    """
    total, how = 0.0, []
    if BUILTIN in sources:
        num_bytes = sum(len(document.text.encode()) for document in read_documents((BUILTIN,), ""))
        total += num_bytes
        how.append(f"{num_bytes:,} bytes of {BUILTIN}, counted")
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for path in list_files(tuple(source for source in sources if source != BUILTIN)):
        by_kind["".join(path.suffixes[-2:]) if path.suffix == ".zst" else path.suffix].append(path)
    for kind, paths in by_kind.items():
        size = sum(path.stat().st_size for path in paths)
        share = _share_of_text(kind, paths, text_field)
        total += size * share
        how.append(
            f"{len(paths)} {kind} of {size:,} bytes"
            + ("" if share == 1 else f", {share:.2f} of text in each, by a sample")
        )
    return Figure(value=total, source=", ".join(how))


def bytes_per_token(
    tokenizer: PreTrainedTokenizerBase, sources: tuple[str, ...], text_field: str, num_around: int
) -> Figure:
    """Of the first megabyte of the sources, by that tokenizer; `num_around` ids begin and end a document.

    Raises:
        InputError: as `text_bytes`.
    """
    texts: list[str] = []
    num_bytes = 0
    for document in read_documents(sources, text_field):
        texts.append(document.text[:_SAMPLED_TEXT_BYTES])
        num_bytes += len(texts[-1].encode())
        if num_bytes >= _SAMPLED_TEXT_BYTES:
            break
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    num_tokens = sum(len(ids) + num_around for ids in encoded)
    value = num_bytes / max(num_tokens, 1)
    return Figure(value=value, source=f"{value:.2f} bytes of text a token, by the tokenizer on {num_bytes:,} of them")


def _share_of_text(kind: str, paths: list[Path], text_field: str) -> float:
    """Bytes of text in a byte of file; 1 where the file is the text."""
    sample = paths[:: max(len(paths) // _SAMPLED_FILES, 1)][:_SAMPLED_FILES]
    match kind:
        case ".jsonl":
            return _mean(_text_of_lines(path, text_field) for path in sample)
        case ".jsonl.zst":
            return _mean(_text_of_frames(path, text_field) for path in sample)
        case ".parquet":
            return _mean(_text_of_rows(path, text_field) for path in sample)
        case _:
            return 1.0


def _mean(pairs: Iterable[tuple[float, float]]) -> float:
    found = list(pairs)
    return sum(text for text, _ in found) / max(sum(size for _, size in found), 1)


def _text_of_lines(path: Path, text_field: str) -> tuple[float, float]:
    """Bytes of text, and of the lines that hold it."""
    with path.open("rb") as file:
        size = sum(len(line) for line in islice(file, _SAMPLED_RECORDS))
    return _sampled_text(path, text_field), size


def _text_of_frames(path: Path, text_field: str) -> tuple[float, float]:
    """Bytes of text, and what their lines take of the file, if they are compressed as well as the file's beginning."""
    with path.open("rb") as raw, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
        file = io.BufferedReader(stream)
        size = sum(len(line) for line in islice(file, _SAMPLED_RECORDS))
        num_read = size + len(file.read(_INFLATED_BYTES))
        compressed = raw.tell() / max(num_read, 1)
    return _sampled_text(path, text_field), size * compressed


def _text_of_rows(path: Path, text_field: str) -> tuple[float, float]:
    num_rows = pyarrow.parquet.read_metadata(path).num_rows
    part = min(_SAMPLED_RECORDS, num_rows)
    return _sampled_text(path, text_field) * num_rows / max(part, 1), path.stat().st_size


def _sampled_text(path: Path, text_field: str) -> int:
    return sum(len(d.text.encode()) for d in islice(read_documents((str(path),), text_field), _SAMPLED_RECORDS))
