"""The kinds of files that can be read, by suffix; kept apart from the readers, so that none need be imported."""

from __future__ import annotations

from pathlib import Path

Place = Path | str
"""A file: a path on this machine, or a URL as text."""

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_KINDS = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json", ".csv", ".tsv", *TABLE_SUFFIXES)


def kind_of(path: Place) -> str | None:
    """Return the suffix that says how a file is read, without the suffix of its compression; None if it is unknown."""
    name = str(path).rpartition("/")[2].lower()
    packed = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    kind = next((kind for kind in _KINDS if name.removesuffix(packed).endswith(kind)), None)
    return None if packed and kind in TABLE_SUFFIXES else kind


def known_suffixes() -> str:
    """Return every kind of file that can be read, in words, for errors."""
    return f"{' '.join(_KINDS)}, and {' '.join(COMPRESSIONS)} behind those of text"


def is_packed(path: Place) -> bool:
    """Return whether a file is compressed as a whole, so that no part of it can be read alone."""
    return str(path).lower().endswith(COMPRESSIONS)
