"""Finds the files of conversations, without importing the libraries that read them."""

from __future__ import annotations

from capgap.pipeline.corpus.files import list_files
from capgap.pipeline.corpus.kinds import TEXT_SUFFIXES, Place, kind_of
from capgap.schemas.errors import InputError
from capgap.schemas.run_tune import TuneSettings


def chat_files(settings: TuneSettings) -> list[Place]:
    """Return the files of the conversations that `tune.sources` names.

    Raises:
        InputError: A source names no file, or a file of plain text instead of records.
    """
    files = list_files(settings.sources, "tune")
    for file in files:
        if kind_of(file) in TEXT_SUFFIXES:
            raise InputError(
                "holds no conversations",
                where=f"tune.sources: {file}",
                expected="a file of records, for example .jsonl",
            )
    return files
