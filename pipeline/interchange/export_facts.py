"""What an exported Parquet file says of itself in its schema, so that an import cannot mistake it for another."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.interchange.parquet import open_file
from capgap.schemas.base import Record
from capgap.schemas.errors import MismatchError
from capgap.schemas.facts import RecordingFacts, TokenizerFacts
from capgap.schemas.interchange import ImportSettings
from capgap.schemas.run_cache import RecordingName
from capgap.schemas.run_corpus import ContextRule

KEY = b"capgap"


class ExportFacts(Record):
    """The facts of one exported file."""

    cache: str
    """Digest of the cache's content."""

    shard: str
    """Digest of the shard that the file was made of."""

    recording: RecordingName
    """Name of the cache's recording in the file."""

    facts: RecordingFacts
    """The facts of that recording."""

    tokenizer: TokenizerFacts
    """The tokenizer of corpus and teacher."""

    context: ContextRule
    """What the teacher saw before a token."""

    temperature: float
    """The temperature at which the teacher was recorded."""


def facts_of(path: Path) -> ExportFacts | None:
    """Return what a file says of itself; None where it is no export, or one of another version."""
    metadata = open_file(path).schema_arrow.metadata or {}
    try:
        return ExportFacts.model_validate_json(metadata[KEY])
    except (KeyError, ValidationError):
        return None


def require_same_facts(path: Path, settings: ImportSettings, tokenizer: TokenizerFacts) -> None:
    """Raise MismatchError if an exported file differs from the settings in tokenizer, context rule or temperature."""
    facts = facts_of(path)
    if facts is None:
        return
    if facts.tokenizer.fingerprint != tokenizer.fingerprint:
        raise MismatchError(
            "the captures were made with another tokenizer",
            where=path,
            found=f"fingerprint {facts.tokenizer.fingerprint[:12]}",
            expected=f"{tokenizer.fingerprint[:12]}, that of --tokenizer {settings.tokenizer}",
            fix="name the tokenizer of the corpus that the cache was made of",
        )
    for name, found, given in (
        ("context", facts.context, settings.context),
        ("temperature", facts.temperature, settings.temperature),
    ):
        if given is not None and found != given:
            raise MismatchError(
                f"the captures are of another {name}", where=path, found=found, expected=given,
                fix=f"set --{name} {found}",
            )  # fmt: skip
