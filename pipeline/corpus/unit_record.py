"""What is known of a finished unit of the corpus."""

from __future__ import annotations

from pydantic import Field

from capgap.pipeline.corpus.bad_records import BadTally
from capgap.pipeline.corpus.split import Split
from capgap.schemas.base import Entry
from capgap.schemas.facts import SourceCounts
from capgap.schemas.manifest import ShardEntry


class SplitCounts(Entry):
    """What a unit read of one split, whether it fills a sequence or not."""

    num_documents: int = 0
    """Documents that were packed."""

    num_tokens: int = 0
    """Tokens of their text."""

    num_dropped: int = 0
    """Left out because they were too long."""

    num_dropped_answers: int = 0
    """Of whole conversations, left out because they did not end within a sequence."""


class ContentCounts(Entry):
    """What is in one shard, or in several."""

    num_labels: int = 0
    """Tokens of its sequences that count as labels."""

    by_source: dict[int, SourceCounts] = Field(default_factory=dict)
    """The documents that begin in it, by the number of their source."""

    by_length: tuple[int, ...] = ()
    """These by their tokens, see `SplitFacts`."""


class UnitRecord(Entry):
    """What is known of a finished unit."""

    shards: dict[Split, tuple[ShardEntry, ...]]
    """Its shards by split, in their order."""

    shard_counts: dict[Split, tuple[ContentCounts, ...]]
    """What is in each of them."""

    counts: dict[Split, SplitCounts]
    """What was read for them."""

    num_repeated: int
    """Documents left out because their text was there before."""

    bad: BadTally
    """Records that could not be used."""

    damaged: tuple[str, ...] = ()
    """What is wrong with files of which the rest was left out."""
