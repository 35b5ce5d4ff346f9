"""The data of a training: the loader of its micro-batches, and the held-out micro-batches.

one cache:        SequenceLoader
several caches:   one SequenceLoader each --MixedLoader, by weight--> micro-batches of one shape; a step reads one cache
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from capgap.pipeline.store import Batch, LoaderSettings, MixedLoader, SequenceLoader, ShardReader
from capgap.pipeline.store.batch import collate
from capgap.pipeline.store.rows import sequences_per_row
from capgap.pipeline.train.task import CacheSource, TrainingTask

# The name of the run's own cache in a mix; a run file cannot give this name to another cache.
OWN = ""
# A further cache is read as often as the mix needs it, so it has more epochs than any training has steps.
_WITHOUT_END = 1 << 32
# By default all measurements together read about this share of the number of training sequences. To measure a sequence
# takes a third of the arithmetic of training on it.
_MEASURED_SHARE = 0.1
_MOST_MEASURED, _LEAST_MEASURED = 64, 8


def training_loader(task: TrainingTask) -> SequenceLoader | MixedLoader:
    """Make the loader that yields the micro-batches of the whole training in their order.

    Raises:
        InputError: There is too little data for one step, or the caches do not make rows of one shape.
    """
    settings = task.settings
    own = CacheSource(task.training, task.weight, task.context, task.target_temperature, task.writer_logprobs)
    if not task.others:
        return _loader(task, own, settings.num_epochs, settings.max_tokens)
    loaders = {OWN: _loader(task, own, settings.num_epochs)}
    loaders |= {name: _loader(task, source, _WITHOUT_END) for name, source in task.others.items()}
    weights = {OWN: own.weight} | {name: source.weight for name, source in task.others.items()}
    mixed = MixedLoader(loaders, weights, task.seed, epochs_of=OWN)
    if settings.max_tokens is None or settings.max_tokens >= mixed.num_tokens:
        return mixed
    return MixedLoader(loaders, weights, task.seed, epochs_of=OWN, max_tokens=settings.max_tokens)


def num_validation_sequences(task: TrainingTask, num_steps: int) -> int:
    """Return the number of held-out sequences in each measurement: the one that is set, or as many as cost little.

    Args:
        task: The training.
        num_steps: Number of optimizer steps in the whole training.
    """
    settings = task.settings
    wanted = settings.num_validation_sequences
    if wanted is None:
        num_times = -(-num_steps // settings.validate_every_steps) + task.measures_before
        affordable = int(_MEASURED_SHARE * num_steps * settings.batch_sequences) // num_times
        wanted = min(_MOST_MEASURED, max(_LEAST_MEASURED, affordable))
    return min(wanted, task.heldout.shard_set.num_sequences)


def heldout_batches(task: TrainingTask, wanted: int) -> Iterator[Batch]:
    """Yield the first `wanted` held-out sequences in micro-batches, with targets where the cache has them.

    The cache holds targets for the first sequences of the same held-out text.
    """
    num_scored = 0
    if task.heldout_targets is not None:
        num_scored = min(wanted, task.heldout_targets.shard_set.num_sequences)
        yield from _batches_of(task, task.heldout_targets, range(num_scored))
    yield from _batches_of(task, task.heldout, range(num_scored, wanted), text_alone=True)


def _batches_of(task: TrainingTask, reader: ShardReader, wanted: range, text_alone: bool = False) -> Iterator[Batch]:
    """Yield the reader's sequences whose numbers are in `wanted`, without their targets if `text_alone` is set."""
    first = 0
    places = [(shard, row) for shard, one in enumerate(reader.shard_set.shards) for row in range(one.num_sequences)]
    logprobs = None if text_alone else task.heldout_logprobs
    for index, size in enumerate(m.num_sequences for s in reader.shard_set.shards for m in s.each_member()):
        rows = range(max(wanted.start - first, 0), min(wanted.stop - first, size))
        first += size
        if not rows:
            continue
        sequences, targets = reader.read(index)
        for start in range(rows.start, rows.stop, task.micro_batch):
            kept = None if text_alone else targets
            part = [(sequences, kept, row) for row in range(start, min(start + task.micro_batch, rows.stop))]
            batch = collate(part, reader.codec.num_ids, task.target_temperature, task.context)
            if logprobs is not None:
                of_batch = places[first - size + start : first - size + start + len(part)]
                batch.writer_logprobs_N = torch.from_numpy(np.concatenate([logprobs(*one) for one in of_batch]))
            yield batch


def _loader(task: TrainingTask, source: CacheSource, num_epochs: int, max_tokens: int | None = None) -> SequenceLoader:
    settings = task.settings
    return SequenceLoader(
        source.reader,
        LoaderSettings(
            _as_many_rows(task, source, settings.batch_sequences),
            task.seed,
            num_epochs=num_epochs,
            max_tokens=max_tokens,
            micro_batch=_as_many_rows(task, source, task.micro_batch),
            rank=task.ranks.rank,
            world_size=task.ranks.world_size,
            row_len=task.row_len,
            on_corrupt=settings.on_corrupt,
            decode_on=task.device if settings.decode == "device" else None,
            target_temperature=source.target_temperature,
            context=source.context,
            writer_logprobs=source.writer_logprobs,
        ),
    )


def _as_many_rows(task: TrainingTask, source: CacheSource, num_sequences: int) -> int:
    """Return how many sequences of a source fill as many rows as `num_sequences` of the task's own cache."""
    own, others = (_per_row(task, reader.shard_set.seq_len) for reader in (task.training, source.reader))
    return num_sequences if own == others else num_sequences // own * others


def _per_row(task: TrainingTask, seq_len: int) -> int:
    return 1 if task.row_len is None else sequences_per_row(task.row_len, seq_len)
