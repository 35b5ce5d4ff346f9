"""What a training reads: the loader of its micro-batches, and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.store import Batch, SequenceLoader
from capgap.pipeline.store.batch import collate
from capgap.pipeline.train.task import Task


def training_loader(task: Task) -> SequenceLoader:
    """The micro-batches of the whole training, in their order.

    Raises:
        InputError: too little data for one step.
    """
    settings = task.settings
    return SequenceLoader(
        task.training,
        settings.batch_sequences,
        task.seed,
        num_epochs=settings.num_epochs,
        max_tokens=settings.max_tokens,
        micro_batch=task.micro_batch,
        rank=task.ranks.rank,
        world_size=task.ranks.world_size,
        on_corrupt=settings.on_corrupt,
        decode_on=task.device if settings.decode == "device" else None,
        heat=task.heat,
    )


def heldout_batches(task: Task) -> Iterator[Batch]:
    """The first held-out sequences, in micro-batches."""
    left, reader = task.settings.num_validation_sequences, task.heldout
    for index in range(reader.shard_set.num_members):
        sequences, _ = reader.read(index)
        for start in range(0, min(left, len(sequences)), task.micro_batch):
            stop = min(start + task.micro_batch, left, len(sequences))
            yield collate([(sequences, None, row) for row in range(start, stop)], num_draws=1)
        left -= len(sequences)
        if left <= 0:
            return
