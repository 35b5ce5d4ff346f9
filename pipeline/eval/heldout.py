"""The held-out text that every model is measured on.

Legend: B sequences of a block, S sequences, L targets per sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from capgap.pipeline.eval.intervals import Int64Array
from capgap.pipeline.store import read_blocks
from capgap.schemas.errors import InputError
from capgap.schemas.facts import CacheFacts, TextFacts
from capgap.schemas.manifest import ShardSet
from capgap.schemas.records import Sequences


def first_sequences(folder: Path | str, shard_set: ShardSet, num_sequences: int) -> Sequences:
    """Return the first sequences of a shard set that hold a label.

    Args:
        folder: Folder or URL of the shards.
        shard_set: The shard set's entry in the manifest.
        num_sequences: Number of sequences to return; all of them, if there are fewer.

    Raises:
        InputError: No sequence holds a label.
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
    """Return the number of labels of each sequence, int64 [S]."""
    labels_S: Int64Array = sequences.mask_BL1[:, 1:].sum(axis=1, dtype=np.int64)
    return labels_S


def labels_per_byte(facts: TextFacts, sequences: Sequences, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> float:
    """Return the number of labels per UTF-8 byte of their text; a loss per label times this is a loss per byte.

    Where every token of the text is a label, the corpus has counted both. For conversations, the labels are decoded and
    their bytes counted without special tokens, because text that is only read, and marks of roles, must not count.

    Args:
        facts: Facts of the corpus, or of the cache that stands for it.
        sequences: The held-out sequences that were measured.
        tokenizer: Returns the tokenizer; only called where labels are decoded.
    """
    heldout = facts.splits["heldout"]
    num_labels = sum(counts.num_labels for counts in heldout.by_source.values())
    is_aligned = isinstance(facts, CacheFacts) and facts.aligned is not None  # aligned caches hold no conversations
    is_all = num_labels == heldout.num_text_tokens if heldout.by_source else bool(sequences.mask_BL1[:, 1:].all())
    if is_all or is_aligned:
        return heldout.num_text_tokens / heldout.num_text_bytes
    said = []
    for tokens_L, mask_L in zip(sequences.tokens_BL1[:, 1:], sequences.mask_BL1[:, 1:], strict=True):
        ends = np.flatnonzero(np.diff(mask_L.astype(np.int8), prepend=0, append=0)).tolist()
        said += [tokens_L[start:stop].tolist() for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    texts = tokenizer().batch_decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    # the labels may all be special tokens that end turns, which have no text
    return sum(map(len, said)) / max(num_bytes, 1)
