"""The files of conversations, found without what it takes to read them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capgap.pipeline.corpus.sources import list_files
from capgap.schemas.errors import InputError
from capgap.schemas.run_tune import TuneSettings


def chat_files(settings: TuneSettings) -> list[Path]:
    """The files of the conversations.

    Raises:
        InputError: a source names nothing, or no file of conversations.
    """
    with as_of_tune():
        files = list_files(settings.sources)
    for file in files:
        if not file.name.endswith((".jsonl", ".jsonl.zst", ".parquet")):
            raise InputError(
                "holds no conversations", where=f"tune.sources: {file}", expected=".jsonl, .jsonl.zst or .parquet"
            )
    return files


@contextmanager
def as_of_tune() -> Iterator[None]:
    """Errors of the corpus's readers in the words of these settings."""
    try:
        yield
    except InputError as error:
        where = f"tune.sources: {str(error.where).removeprefix('corpus.sources: ')}"
        fix = None if error.fix is None else error.fix.replace("corpus.", "tune.").partition(", or leave it out")[0]
        if str(error.where).startswith("tune."):
            raise
        raise InputError(error.what, where=where, found=error.found, expected=error.expected, fix=fix) from None
