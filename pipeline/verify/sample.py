"""The choice of sequences that are scored again: the first of some shards, with those that shared their batches.

A shard is one submission, which an engine works through in order. So its first sequences are in the same batches again
if the sequences after them, up to the end of a batch, are submitted with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from capgap.pipeline.store import ShardReader
from capgap.schemas.manifest import Manifest
from capgap.schemas.records import ChunkTargets, SampledTargets, Sequences, Targets, TopkTargets
from capgap.schemas.run_cache import RecordingName

_LEAST_SEQUENCES, _LEAST_TARGETS = 8, 8192


@dataclass(frozen=True)
class Group:
    """The first sequences of a shard: how many are compared, and how many are scored."""

    shard: int
    num_sequences: int
    num_scored: int


@dataclass(frozen=True)
class Part:
    """A group's scored sequences, and the cache's targets of those that are compared."""

    group: Group
    sequences: Sequences
    kept: dict[RecordingName, Targets]


def groups_of(manifest: Manifest, fraction: float, batch_tokens: int) -> list[Group]:
    """Return the groups to score: one batch from each of some random shards, or more from every shard if needed.

    The same cache, fraction and batches give the same groups.
    """
    shard_set = next(iter(manifest.shard_sets.values()))
    seq_len, sizes = shard_set.seq_len, [shard.num_sequences for shard in shard_set.shards]
    least = max(_LEAST_SEQUENCES, math.ceil(_LEAST_TARGETS / seq_len), math.ceil(fraction * sum(sizes)))
    wanted, most = min(least, sum(sizes)), max(1, batch_tokens // seq_len)
    while sum(min(size, most) for size in sizes) < wanted:
        most *= 2
    groups, rng = [], np.random.default_rng(int(manifest.content[:16], 16))
    for shard in rng.permutation(len(sizes)).tolist():
        num = min(sizes[shard], most, wanted)
        if num:
            groups.append(Group(shard, num, min(sizes[shard], _num_scored(num, seq_len, batch_tokens))))
        wanted -= num
    return sorted(groups, key=lambda group: group.shard)


def read_part(readers: dict[RecordingName, ShardReader], group: Group) -> Part:
    """Read a group's sequences and targets; raises CorruptError if a shard is damaged."""
    sequences: list[Sequences] = []
    kept: dict[RecordingName, Targets] = {}
    for name, reader in readers.items():
        blocks: list[tuple[Sequences, Targets | None]] = []
        num = 0
        while num < group.num_scored:
            blocks.append(reader.read_member(group.shard, len(blocks)))
            num += len(blocks[-1][0])
        targets = [targets for _, targets in blocks if targets is not None]
        kept[name] = first_of(joined(targets), group.num_sequences)
        sequences = [block for block, _ in blocks]
    return Part(group, Sequences.joined(sequences).part(slice(group.num_scored)), kept)


def joined(parts: list[Targets]) -> Targets:
    """Return the targets of all parts, of one recording, one after the other."""
    first = parts[0]
    assert not isinstance(first, ChunkTargets), "a teacher's own rows are scored again"
    return type(first)(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(first)})


def first_of(targets: Targets, num_sequences: int) -> Targets:
    """Return the targets of the first sequences."""
    assert not isinstance(targets, ChunkTargets), "a teacher's own rows are scored again"
    part = slice(num_sequences)
    if isinstance(targets, TopkTargets):
        return TopkTargets(*(values[part] for values in vars(targets).values()))
    ids = slice(int(targets.num_ids_BL[part].sum()))
    return SampledTargets(
        targets.num_ids_BL[part], targets.ids_D[ids], targets.counts_D[ids], targets.label_logprobs_BL[part]
    )


def _num_scored(num_sequences: int, seq_len: int, batch_tokens: int) -> int:
    """Return the number of sequences up to the end of a batch.

    vLLM cuts batches from the tokens of all requests in a row, and transformers batches whole sequences.
    """
    in_vllm = math.ceil(math.ceil(num_sequences * seq_len / batch_tokens) * batch_tokens / seq_len)
    size = max(1, batch_tokens // (seq_len + 1))
    return max(in_vllm, math.ceil(num_sequences / size) * size)
