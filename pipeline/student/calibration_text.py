"""The text on which a model is measured before it is pruned or quantised."""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.eval.heldout import first_sequences
from capgap.pipeline.models.text import RunText
from capgap.pipeline.store import Batch
from capgap.pipeline.store.batch import collate
from capgap.schemas.facts import CacheFacts


class CalibrationText:
    """The first training sequences of the student, from the corpus or from a cache that replaces it.

    Args:
        text: The text of the run.
        num_sequences: Number of sequences; all of them, if there are fewer.
        batch_sequences: Number of sequences in one batch.

    Attributes:
        num_sequences: Number of sequences that were found.
        vocab_size: Size of the real vocabulary.
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
        """Yield all sequences in batches without targets; it can be called repeatedly."""
        for start in range(0, self.num_sequences, self._size):
            rows = range(start, min(start + self._size, self.num_sequences))
            yield collate([(self._sequences, None, row) for row in rows], 0, context=self._context)
