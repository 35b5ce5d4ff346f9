"""The record of a finished unit of the corpus."""

from __future__ import annotations

from pydantic import Field

from capgap.pipeline.corpus.bad_records import BadTally
from capgap.pipeline.corpus.split import Split
from capgap.schemas.base import Entry
from capgap.schemas.facts import SourceCounts
from capgap.schemas.manifest import ShardEntry


class SplitCounts(Entry):
    """Counts of the documents that a unit read for one split, including those that fill no sequence."""

    num_documents: int = 0
    """Number of documents that were packed."""

    num_tokens: int = 0
    """Number of tokens of the packed documents."""

    num_dropped: int = 0
    """Number of documents left out because they are too long."""

    num_dropped_answers: int = 0
    """Number of answers of whole conversations left out because they, or an earlier answer, do not end within one
    sequence."""


class ContentCounts(Entry):
    """Counts of what one shard, or several together, hold."""

    num_labels: int = 0
    """Number of tokens in the sequences that are labels."""

    by_source: dict[int, SourceCounts] = Field(default_factory=dict)
    """Counts of the documents that begin in the shard, by the number of their source."""

    by_length: tuple[int, ...] = ()
    """Number of these documents by length: entry i counts lengths in tokens with i binary digits."""


class UnitRecord(Entry):
    """What a finished unit made."""

    shards: dict[Split, tuple[ShardEntry, ...]]
    """The unit's shards of each split, in their order."""

    shard_counts: dict[Split, tuple[ContentCounts, ...]]
    """Counts of what each of these shards holds."""

    counts: dict[Split, SplitCounts]
    """Counts of the documents that were read for each split."""

    num_repeated: int
    """Number of documents left out because their text occurs before them."""

    bad: BadTally
    """The records that could not be used."""

    damaged: tuple[str, ...] = ()
    """For each damaged file whose rest was left out, the message of its error."""
