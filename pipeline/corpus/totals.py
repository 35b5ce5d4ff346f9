"""What the units of a corpus have together, as far as it is wanted."""

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
    """Takes the records of all units in their order.

    Attributes:
        shards: those that are wanted, of each split.
        counts: what was read for a split.
        inside: what is in its shards.
        ids_SV: how often each split holds each id [S, V].
        bad: records that could not be used.
        num_repeated: documents left out because their text was there before.
        damaged: what is wrong with files of which the rest was left out.
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
        """Take a unit."""
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
        """Documents that were read of a split, or of all."""
        of = SPLITS if split is None else (split,)
        return sum(self.counts[each].num_documents + self.counts[each].num_dropped for each in of)

    def split_facts(self, split: Split) -> SplitFacts:
        """The facts of a split."""
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
        """How often the first shards of a unit, of which the others are too much, hold each id."""
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
