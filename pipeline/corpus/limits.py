"""Applies the limits of splits and sources (`max_tokens`): of the finished units' shards, the first ones are taken.

A split or a source with a limit is full once earlier units hold as many tokens as it may have. Which shards are taken
depends only on the shards of all units in their order, and not on when each unit was made: a unit that was made before
it was known that a split is full holds more shards than are taken.
"""

from __future__ import annotations

from collections.abc import Callable

from capgap.pipeline.corpus.listing import Listing
from capgap.pipeline.corpus.split import SPLITS, Split
from capgap.pipeline.corpus.unit_record import UnitRecord
from capgap.schemas.manifest import ShardEntry
from capgap.schemas.run_corpus import CorpusSettings

_NOTHING: frozenset[Split] = frozenset()


class Limits:
    """Takes the records of units in their order, and says which shards of each are wanted.

    Attributes:
        num_added: number of units whose records were taken.
    """

    def __init__(self, settings: CorpusSettings, listing: Listing) -> None:
        self._settings, self._listing, self.num_added = settings, listing, 0
        self._most = [source.max_tokens for _, source in settings.named_sources]
        self._has_any = bool(settings.max_tokens) or any(self._most)
        self._of_split = dict.fromkeys(SPLITS, 0)
        self._of_source = [0] * len(self._most)

    def add(self, record: UnitRecord) -> dict[Split, tuple[ShardEntry, ...]]:
        """Take the record of the next unit, and return the shards of each split that are wanted of it."""
        unit, full = self.num_added, self._full_for(self.num_added)
        self.num_added += 1
        taken: dict[Split, tuple[ShardEntry, ...]] = {}
        for split in SPLITS:
            taken[split] = () if split in full else self._first(split, record.shards[split])
            num_tokens = sum(shard.num_sequences for shard in taken[split]) * self._settings.seq_len
            self._of_split[split] += num_tokens
            if self._has_any:
                self._of_source[self._listing.source_of(unit)] += num_tokens
        return taken

    def full(self, record_of: Callable[[int], UnitRecord | None], unit: int) -> frozenset[Split]:
        """Return the splits of which a unit need not make anything, judged by the finished units before it.

        Args:
            record_of: returns the record of a unit; None if the unit is not finished.
            unit: number of the unit.
        """
        if not self._has_any:
            return _NOTHING
        while self.num_added < unit and (record := record_of(self.num_added)) is not None:
            self.add(record)
        return self._full_for(unit)

    def _full_for(self, unit: int) -> frozenset[Split]:
        if not self._has_any:
            return _NOTHING
        source = self._listing.source_of(unit)
        most = self._most[source]
        if most is not None and self._of_source[source] >= most:
            return frozenset(SPLITS)
        fractions = {"teacher": self._settings.teacher_fraction}
        return frozenset(split for split in SPLITS if self._is_full(split) or fractions.get(split) == 0)

    def _is_full(self, split: Split) -> bool:
        most = self._settings.max_tokens.get(split)
        return most is not None and self._of_split[split] >= most

    def _first(self, split: Split, shards: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
        """Return as few of the next shards as fill the split up to its limit; all shards if they do not fill it."""
        most = self._settings.max_tokens.get(split)
        if most is None:
            return shards
        total = self._of_split[split]
        for number, shard in enumerate(shards):
            if total >= most:
                return shards[:number]
            total += shard.num_sequences * self._settings.seq_len
        return shards
