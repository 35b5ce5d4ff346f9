"""The files of conversations, found without what it takes to read them."""

from __future__ import annotations

from capgap.pipeline.corpus.files import list_files
from capgap.pipeline.corpus.kinds import TEXT_SUFFIXES, Place, kind_of
from capgap.schemas.errors import InputError
from capgap.schemas.run_tune import TuneSettings


def chat_files(settings: TuneSettings) -> list[Place]:
    """The files of the conversations.

    Raises:
        InputError: a source names nothing, or no file of records.
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
