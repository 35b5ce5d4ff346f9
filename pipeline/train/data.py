"""What a training reads: the loader of its micro-batches, and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.store import Batch, SequenceLoader, ShardReader
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
    """The first held-out sequences, in micro-batches: with the teacher's targets as far as the cache has them.

    The cache holds the first sequences of the same held-out text.
    """
    wanted, num_scored = task.settings.num_validation_sequences, 0
    if task.heldout_targets is not None:
        num_scored = min(wanted, task.heldout_targets.shard_set.num_sequences)
        yield from _batches_of(task, task.heldout_targets, range(num_scored))
    yield from _batches_of(task, task.heldout, range(num_scored, wanted))


def _batches_of(task: Task, reader: ShardReader, wanted: range) -> Iterator[Batch]:
    """Those of the reader's sequences, or as many of them as there are."""
    first = 0
    for index, size in enumerate(m.num_sequences for s in reader.shard_set.shards for m in s.each_member()):
        rows = range(max(wanted.start - first, 0), min(wanted.stop - first, size))
        first += size
        if not rows:
            continue
        sequences, targets = reader.read(index)
        for start in range(rows.start, rows.stop, task.micro_batch):
            part = range(start, min(start + task.micro_batch, rows.stop))
            yield collate([(sequences, targets, row) for row in part], reader.codec.num_ids, task.heat)
