"""What a training reads: the loader of its micro-batches, and the held-out ones.

one cache:        SequenceLoader
several caches:   a SequenceLoader each --MixedLoader, by weight--> micro-batches of one shape, each of one cache
"""

from __future__ import annotations

from collections.abc import Iterator

from capgap.pipeline.store import Batch, MixedLoader, SequenceLoader
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.rows import sequences_per_row
from capgap.pipeline.train.task import Source, Task

# The name of the run's own cache in a mix; the run file cannot give it to another.
OWN = ""
# Passes over a further cache, which is read as often as the mix takes: more than any training has steps.
_WITHOUT_END = 1 << 32


def training_loader(task: Task) -> SequenceLoader | MixedLoader:
    """The micro-batches of the whole training, in their order.

    Raises:
        InputError: too little data for one step, or the caches do not make rows of one shape.
    """
    settings = task.settings
    own = Source(task.training, task.weight, task.context, task.heat)
    if not task.others:
        return _loader(task, own, settings.num_epochs, settings.max_tokens)
    loaders = {OWN: _loader(task, own, settings.num_epochs)}
    loaders |= {name: _loader(task, source, _WITHOUT_END) for name, source in task.others.items()}
    weights = {OWN: own.weight} | {name: source.weight for name, source in task.others.items()}
    mixed = MixedLoader(loaders, weights, task.seed, epochs_of=OWN)
    if settings.max_tokens is None or settings.max_tokens >= mixed.num_tokens:
        return mixed
    return MixedLoader(loaders, weights, task.seed, epochs_of=OWN, max_tokens=settings.max_tokens)


def heldout_batches(task: Task) -> Iterator[Batch]:
    """The first held-out sequences, in micro-batches."""
    left, reader = task.settings.num_validation_sequences, task.heldout
    for index in range(reader.shard_set.num_members):
        sequences, _ = reader.read(index)
        for start in range(0, min(left, len(sequences)), task.settings.micro_batch):
            stop = min(start + task.settings.micro_batch, left, len(sequences))
            yield collate([(sequences, None, row) for row in range(start, stop)], num_draws=1, context=task.context)
        left -= len(sequences)
        if left <= 0:
            return


def _loader(task: Task, source: Source, num_epochs: int, max_tokens: int | None = None) -> SequenceLoader:
    settings = task.settings
    return SequenceLoader(
        source.reader,
        _as_many_rows(task, source, settings.batch_sequences),
        task.seed,
        num_epochs=num_epochs,
        max_tokens=max_tokens,
        micro_batch=_as_many_rows(task, source, settings.micro_batch),
        row_len=task.row_len,
        on_corrupt=settings.on_corrupt,
        decode_on=task.device if settings.decode == "device" else None,
        heat=source.heat,
        context=source.context,
    )


def _as_many_rows(task: Task, source: Source, num_sequences: int) -> int:
    """Sequences of a source that fill as many rows as that many of the task's own."""
    own, its = (_per_row(task, reader.shard_set.seq_len) for reader in (task.training, source.reader))
    return num_sequences if own == its else num_sequences // own * its


def _per_row(task: Task, seq_len: int) -> int:
    return 1 if task.row_len is None else sequences_per_row(task.row_len, seq_len)
