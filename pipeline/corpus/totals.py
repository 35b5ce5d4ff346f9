"""Sums up the units of a corpus, without the shards that its limits leave out."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.limits import Limits
from capgap.pipeline.corpus.split import SPLITS, Split
from capgap.pipeline.corpus.unit import CorpusJob
from capgap.pipeline.corpus.unit_record import ContentCounts, SplitCounts, UnitRecord
from capgap.pipeline.store import ShardReader
from capgap.schemas.facts import SourceCounts, SplitFacts
from capgap.schemas.manifest import ShardEntry


class Totals:
    """The sums over all units, whose records are added in the order of the units.

    Attributes:
        shards: the wanted shards of each split.
        counts: counts of the documents that were read for each split.
        inside: counts of what the wanted shards of each split hold.
        ids_SV: how often each split holds each token id [S, V], int64.
        bad: the records that could not be used.
        num_repeated: number of documents left out because their text occurs before them.
        damaged: for each damaged file whose rest was left out, the message of its error.
    """

    def __init__(self, job: CorpusJob) -> None:
        self._job, self._limits = job, Limits(job.settings, job.listing)
        self.shards: dict[Split, list[ShardEntry]] = {split: [] for split in SPLITS}
        self.counts = {split: SplitCounts() for split in SPLITS}
        self.inside = {split: ContentCounts() for split in SPLITS}
        self.ids_SV: npt.NDArray[np.int64] = np.zeros((len(SPLITS), job.facts.vocab_size), np.int64)
        self.bad = BadRecords("corpus", "skip", job.settings.max_bad_fraction)
        self.num_repeated = 0
        self.damaged: list[str] = []

    def add(self, unit: int, record: UnitRecord) -> None:
        """Add the record of the next unit; units must come in their order."""
        taken = self._limits.add(record)
        ids_SV = self._job.counts(unit)
        self.bad.add(record.bad)
        self.num_repeated += record.num_repeated
        self.damaged += record.damaged
        for number, split in enumerate(SPLITS):
            shards = taken[split]
            if not shards and record.shards[split]:
                continue
            self.shards[split] += shards
            is_cut = len(shards) < len(record.shards[split])
            self.ids_SV[number] += self._ids_in(split, shards) if is_cut else ids_SV[number]
            self.counts[split] = _read(self.counts[split], record.counts[split])
            for counts in record.shard_counts[split][: len(shards)]:
                self.inside[split] = _inside(self.inside[split], counts)

    def num_documents(self, split: Split | None = None) -> int:
        """Return the number of documents that were read for a split, or for all splits together."""
        of = SPLITS if split is None else (split,)
        return sum(self.counts[each].num_documents + self.counts[each].num_dropped for each in of)

    def split_facts(self, split: Split) -> SplitFacts:
        """Return what the manifest says of the text of a split."""
        names = [name for name, _ in self._job.settings.named_sources]
        by_source: dict[str, SourceCounts] = {}
        for source, counts in sorted(self.inside[split].by_source.items()):
            by_source[names[source]] = _added(by_source.get(names[source], SourceCounts()), counts)
        return SplitFacts(
            num_documents=sum(one.num_documents for one in by_source.values()),
            num_text_bytes=sum(one.num_text_bytes for one in by_source.values()),
            num_text_tokens=sum(one.num_text_tokens for one in by_source.values()),
            by_source=by_source,
            by_length=self.inside[split].by_length,
        )

    def _ids_in(self, split: Split, shards: tuple[ShardEntry, ...]) -> npt.NDArray[np.int64]:
        """Count each token id [V] in the given shards; needed where a unit's own counts include unwanted shards."""
        reader = ShardReader(self._job.folder, self._job.shard_set(split, list(shards)))
        ids_V = np.zeros(self._job.facts.vocab_size, np.int64)
        for member in range(reader.shard_set.num_members):
            ids_V += np.bincount(reader.read(member)[0].tokens_BL1.ravel(), minlength=len(ids_V))
        return ids_V


def _read(left: SplitCounts, right: SplitCounts) -> SplitCounts:
    return SplitCounts(**{name: value + getattr(right, name) for name, value in left})


def _inside(left: ContentCounts, right: ContentCounts) -> ContentCounts:
    by_source = dict(left.by_source)
    for source, counts in right.by_source.items():
        by_source[source] = _added(by_source.get(source, SourceCounts()), counts)
    by_length = map(sum, zip_longest(left.by_length, right.by_length, fillvalue=0))
    return ContentCounts(num_labels=left.num_labels + right.num_labels, by_source=by_source, by_length=tuple(by_length))


def _added(left: SourceCounts, right: SourceCounts) -> SourceCounts:
    return SourceCounts(**{name: value + getattr(right, name) for name, value in left})
