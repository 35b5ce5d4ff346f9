"""Shards of independent samples, with which a cache's systematic samples are compared.

This is no recording of capgap. The store's check of alignment only holds for systematic samples, whose counts are
within one of n p, so these shards are read without it.

Legend: B sequences, L targets, N = B x L rows, n samples, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from capgap.pipeline.store import Block, ShardReader, ShardWriter
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.store.ranking import RANKING_NAME
from capgap.schemas.manifest import ShardEntry
from capgap.schemas.records import SampledTargets, Sequences, Targets


class IndependentReader(ShardReader):
    """Reads shards of independent samples."""

    def read_member(self, shard: int, member: int) -> tuple[Sequences, Targets | None]:
        """Read a member, and check its checksum and structure but not its alignment."""
        entry = self.shard_set.shards[shard].member(member)
        with self.place.open(self.shard_set.shards[shard].file) as file:
            file.seek(entry.offset)
            return self.codec.decode(file.read(entry.num_bytes), self.name_of(shard, member))


def independent_samples(systematic: ShardReader, teacher: PreTrainedModel, folder: Path) -> IndependentReader:
    """Write shards with the same sequences and number of samples; finished shards in `folder` are kept.

    Args:
        systematic: Shards of the recording `sampled`, at temperature 1.
        teacher: The teacher that made them, on the CPU.
        folder: Folder that the shards are written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    assert systematic.codec.ranking is not None
    write_atomically(folder / RANKING_NAME, systematic.codec.ranking.data)
    writer = ShardWriter(folder, folder / "sidecars", "independent", systematic.codec)
    shards: list[ShardEntry] = []
    for shard, entry in enumerate(systematic.shard_set.shards):
        blocks = (_drawn(systematic, teacher, shard, member) for member in range(len(entry.members)))
        shards.append(writer.finished(shard) or writer.write(shard, blocks))
    return IndependentReader(folder, writer.shard_set(shards))


@torch.inference_mode()
def _drawn(systematic: ShardReader, teacher: PreTrainedModel, shard: int, member: int) -> Block:
    sequences, targets = systematic.read_member(shard, member)
    assert isinstance(targets, SampledTargets)
    num_samples, vocab_size = systematic.codec.num_ids, systematic.codec.vocab_size
    generator = torch.Generator().manual_seed((shard << 16) + member)
    num_ids_N, ids, counts = [], [], []
    for tokens_L1 in sequences.tokens_BL1:
        tokens_1L = torch.from_numpy(tokens_L1[None, :-1]).long()
        logits_LV = teacher(input_ids=tokens_1L, use_cache=False).logits[0, :, :vocab_size]
        probs_LV = torch.softmax(logits_LV.float(), -1)
        samples_Ln = torch.multinomial(probs_LV, num_samples, replacement=True, generator=generator).numpy()
        for samples_n in samples_Ln:
            found, times = np.unique(samples_n, return_counts=True)
            num_ids_N.append(len(found))
            ids.append(found)
            counts.append(times)
    return Block(
        sequences,
        SampledTargets(
            np.array(num_ids_N, np.int32).reshape(targets.num_ids_BL.shape),
            np.concatenate(ids).astype(np.int32),
            np.concatenate(counts).astype(np.int32),
            targets.label_logprobs_BL,
        ),
    )
