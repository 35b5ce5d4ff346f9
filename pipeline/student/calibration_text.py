"""Sequences that a model is looked at on before it is pruned or quantised."""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.eval.heldout import first_sequences
from capgap.pipeline.models.text import RunText
from capgap.pipeline.store import Batch
from capgap.pipeline.store.batch import collate
from capgap.schemas.facts import CacheFacts


class CalibrationText:
    """The student's first sequences, as often as they are asked for: the corpus's, or a cache's that stands for it.

    Args:
        text: of the run.
        num_sequences: all of them, if there are fewer.
        batch_sequences: in one batch.
    """

    def __init__(self, text: RunText, num_sequences: int, batch_sequences: int) -> None:
        name = "student"
        if text.of_cache:
            name = next(iter(CacheFacts.model_validate(text.made.manifest.facts).recordings))
        shards = text.made.manifest.shard_sets[name]
        self._sequences = first_sequences(text.made.location, shards, num_sequences)
        self._size, self._context = batch_sequences, text.facts.context
        self.num_sequences, self.vocab_size = len(self._sequences), text.facts.tokenizer.vocab_size

    def batches(self) -> Iterator[Batch]:
        """All of them, without targets."""
        for start in range(0, self.num_sequences, self._size):
            rows = range(start, min(start + self._size, self.num_sequences))
            yield collate([(self._sequences, None, row) for row in rows], 0, context=self._context)
