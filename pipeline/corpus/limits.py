"""How much of a corpus is wanted, and which shards of finished units that are: the first ones, in the units' order.

A split or a source that has a limit is full once the units before have what it may have. Which shards are taken follows
from the shards of all units in their order, and not from who made them when: a unit that was made without knowing that
something is full has more than is taken, and one that knew it has not.
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
    """Takes the records of units one after the other, and says what is wanted of each.

    Attributes:
        num_added: units that were taken.
    """

    def __init__(self, settings: CorpusSettings, listing: Listing) -> None:
        self._settings, self._listing, self.num_added = settings, listing, 0
        self._most = [source.max_tokens for _, source in settings.named_sources]
        self._has_any = bool(settings.max_tokens) or any(self._most)
        self._of_split = dict.fromkeys(SPLITS, 0)
        self._of_source = [0] * len(self._most)

    def add(self, record: UnitRecord) -> dict[Split, tuple[ShardEntry, ...]]:
        """The shards that are taken of the next unit."""
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
        """The splits of which nothing is wanted in a unit, as far as the units before it are finished."""
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
        """The fewest of the next shards with which the split has what it may have."""
        most = self._settings.max_tokens.get(split)
        if most is None:
            return shards
        total = self._of_split[split]
        for number, shard in enumerate(shards):
            if total >= most:
                return shards[:number]
            total += shard.num_sequences * self._settings.seq_len
        return shards
