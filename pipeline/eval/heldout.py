"""The held-out text that every model is measured on.

Legend: B sequences of a block, S sequences, L targets a sequence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from capgap.pipeline.eval.intervals import Int64Array
from capgap.pipeline.store import read_blocks
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import ShardSet
from capgap.schemas.records import Sequences


def first_sequences(folder: Path | str, shard_set: ShardSet, num_sequences: int) -> Sequences:
    """The first sequences of a shard set that hold a label, `num_sequences` of them or all there are.

    Args:
        folder: or URL, of the shards.
        shard_set: their description.
        num_sequences: see above.

    Raises:
        InputError: there is none.
    """
    blocks: list[Sequences] = []
    missing = num_sequences
    for block, _ in read_blocks(folder, shard_set):
        rows_B = np.flatnonzero(block.mask_BL1[:, 1:].any(axis=1))[:missing]
        blocks.append(block.part(rows_B))
        missing -= len(rows_B)
        if missing == 0:
            break
    if missing == num_sequences:
        raise InputError(
            "the held-out split holds no labels", where=folder, fix="raise corpus.heldout_fraction or add text"
        )
    return Sequences.joined(blocks)


def num_labels(sequences: Sequences) -> Int64Array:
    """Labels of each sequence, int64 [S]."""
    labels_S: Int64Array = sequences.mask_BL1[:, 1:].sum(axis=1, dtype=np.int64)
    return labels_S
