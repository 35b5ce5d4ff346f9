"""Packs the documents of one split of a unit into sequences, and writes these into shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from capgap.pipeline.corpus.encode import EncodedDocument
from capgap.pipeline.corpus.pack import AnyPacker, Packer
from capgap.pipeline.corpus.split import Split
from capgap.pipeline.corpus.unit_record import ContentCounts, SplitCounts
from capgap.pipeline.corpus.whole import WholePacker
from capgap.pipeline.store import Block, ShardWriter, split_blocks
from capgap.schemas.facts import SourceCounts, TokenizerFacts
from capgap.schemas.manifest import ShardEntry
from capgap.schemas.records import Sequences
from capgap.schemas.run_corpus import CorpusSettings

# Whole conversations are packed so many tokens at a time, because fewer would leave more padding.
_PACKED_TOKENS = 1 << 20


@dataclass
class _Counted:
    """The counts of a document, which belong as a whole to the shard in which its first row begins."""

    source: int
    num_text_bytes: int
    num_text_tokens: int
    num_labels: int
    is_done: bool = False


class SplitOut:
    """Takes the documents of one split, and writes its shards.

    Args:
        settings: the settings of the corpus.
        writer: writes the unit's shards of this split.
        split: name of the split.
        facts: the facts of the tokenizer.
        bos_ids: ids with which every document begins.

    Attributes:
        shards: the shards that are written.
        shard_counts: counts of what each of these shards holds.
        counts_V: how often these shards hold each token id [V], int64.
    """

    def __init__(
        self,
        settings: CorpusSettings,
        writer: ShardWriter,
        split: Split,
        facts: TokenizerFacts,
        bos_ids: tuple[int, ...],
    ) -> None:
        self._settings, self._size, self._writer = settings, settings.sequences_per_shard, writer
        self._packer: AnyPacker
        if settings.whole_conversations:
            self._packer = WholePacker(settings.seq_len, facts.eos_id)
        else:
            self._packer = Packer(settings.seq_len, facts.eos_id, settings.long_documents, bos_ids)
        self._most = settings.max_tokens.get(split)
        self._parts: list[Sequences] = []
        self._totals = dict.fromkeys(SplitCounts.model_fields, 0)
        # the counts of each row that begins in no shard yet, by the number that the packer gives to the row
        self._waiting: dict[int, _Counted] = {}
        self._num_added = 0
        self._begun: list[list[int]] = []
        self.shards: list[ShardEntry] = []
        self.shard_counts: list[ContentCounts] = []
        self.counts_V = np.zeros(facts.vocab_size, np.int64)

    @property
    def is_full(self) -> bool:
        """Whether this unit alone holds all that the split may have."""
        num_sequences = sum(shard.num_sequences for shard in self.shards)
        return self._most is not None and num_sequences * self._settings.seq_len >= self._most

    @property
    def counts(self) -> SplitCounts:
        """Counts of the documents that were read for the split."""
        return SplitCounts(**self._totals)

    def add(self, source: int, encoded: EncodedDocument) -> int:
        """Add a document of a source, write the shards that are full, and return the document's number of tokens."""
        taken = [self._packer.add(row) for row in encoded.rows]
        self._totals["num_dropped_answers"] += encoded.num_dropped_answers
        if not any(taken):
            self._totals["num_dropped"] += 1
            return 0
        self._totals["num_documents"] += 1
        self._totals["num_tokens"] += sum(taken)
        labels = (
            number if row.mask is None else int(np.count_nonzero(row.mask))
            for row, number in zip(encoded.rows, taken, strict=True)
        )
        counted = _Counted(source, len(encoded.rows[0].document.text.encode()), sum(taken), sum(labels))
        for _ in filter(None, taken):
            self._waiting[self._num_added] = counted
            self._num_added += 1
        least = self._size * (self._settings.seq_len + 1)
        if self._packer.num_waiting >= max(least, _PACKED_TOKENS * self._settings.whole_conversations):
            self._take()
        return sum(taken)

    def end(self) -> None:
        """Pack the waiting documents, and write the last sequences unless the split is full."""
        self._take()
        if self._parts and not self.is_full:
            self._write(Sequences.joined(self._parts))
        self._parts = []

    def _take(self) -> None:
        made, begun = self._packer.take()
        self._begun += begun
        if len(made):
            self._parts.append(made)
        while sum(map(len, self._parts)) >= self._size and not self.is_full:
            whole = Sequences.joined(self._parts)
            self._write(whole.part(slice(0, self._size)))
            self._parts = [whole.part(slice(self._size, None))] if len(whole) > self._size else []

    def _write(self, sequences: Sequences) -> None:
        self.shards.append(self._writer.write(len(self.shards), [Block(part) for part in split_blocks(sequences)]))
        self.counts_V += np.bincount(sequences.tokens_BL1.ravel(), minlength=len(self.counts_V))
        begun, self._begun = self._begun[: len(sequences)], self._begun[len(sequences) :]
        counted = [self._waiting.pop(number) for numbers in begun for number in numbers]
        self.shard_counts.append(_counts_of(counted, int(sequences.mask_BL1[:, 1:].sum())))


def _counts_of(begun: list[_Counted], num_labels: int) -> ContentCounts:
    by_source: dict[int, dict[str, int]] = {}
    by_length = Counter[int]()
    for one in begun:
        # a conversation may have several rows, and is counted with the first of them
        if one.is_done:
            continue
        one.is_done = True
        counts = by_source.setdefault(one.source, dict.fromkeys(SourceCounts.model_fields, 0))
        counts["num_documents"] += 1
        for name in ("num_text_bytes", "num_text_tokens", "num_labels"):
            counts[name] += getattr(one, name)
        by_length[one.num_text_tokens.bit_length()] += 1
    return ContentCounts(
        num_labels=num_labels,
        by_source={source: SourceCounts(**counts) for source, counts in by_source.items()},
        by_length=tuple(by_length[digits] for digits in range(max(by_length, default=-1) + 1)),
    )
