"""What is known of a finished unit of the corpus."""

from __future__ import annotations

from pydantic import Field

from capgap.pipeline.corpus.bad_records import BadTally
from capgap.pipeline.corpus.split import Split
from capgap.schemas.base import Entry
from capgap.schemas.facts import SourceCounts
from capgap.schemas.manifest import ShardEntry


class SplitCounts(Entry):
    """What a unit has of one split."""

    num_documents: int = 0
    """Documents in its sequences, at least in part."""

    num_dropped: int = 0
    """Left out because they were too long."""

    num_dropped_answers: int = 0
    """Of whole conversations, left out because they did not end within a sequence."""

    num_labels: int = 0
    """Tokens of its sequences that count as labels."""

    by_source: dict[int, SourceCounts] = Field(default_factory=dict)
    """Text by the number of its source."""

    by_length: tuple[int, ...] = ()
    """Documents by their tokens, see `SplitFacts`."""


class UnitRecord(Entry):
    """What is known of a finished unit."""

    shards: dict[Split, tuple[ShardEntry, ...]]
    """Its shards by split, in their order."""

    counts: dict[Split, SplitCounts]
    """What is in them."""

    num_repeated: int
    """Documents left out because their text was there before."""

    bad: BadTally
    """Records that could not be used."""

    damaged: tuple[str, ...] = ()
    """What is wrong with files of which the rest was left out."""
