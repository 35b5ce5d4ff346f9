"""The held-out text that every model is measured on.

Legend: B sequences of a block, S sequences, L targets a sequence.
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


def labels_per_byte(facts: TextFacts, sequences: Sequences, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> float:
    """Labels for each UTF-8 byte of the text that they say: a loss per label, times this, is one per byte.

    Where all text is learnt, that is what the corpus counted. Of conversations the text of the labels themselves is
    counted, without special tokens: what is only read, and marks of roles, would make it another number.

    Args:
        facts: of the text.
        sequences: of it, that were measured.
        tokenizer: asked for where the text of labels is counted.
    """
    heldout = facts.splits["heldout"]
    num_labels = sum(counts.num_labels for counts in heldout.by_source.values())
    is_aligned = isinstance(facts, CacheFacts) and facts.aligned is not None  # never of conversations
    is_all = num_labels == heldout.num_text_tokens if heldout.by_source else bool(sequences.mask_BL1[:, 1:].all())
    if is_all or is_aligned:
        return heldout.num_text_tokens / heldout.num_text_bytes
    said = []
    for tokens_L, mask_L in zip(sequences.tokens_BL1[:, 1:], sequences.mask_BL1[:, 1:], strict=True):
        ends = np.flatnonzero(np.diff(mask_L.astype(np.int8), prepend=0, append=0)).tolist()
        said += [tokens_L[start:stop].tolist() for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    texts = tokenizer().batch_decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    num_bytes = sum(len(text.encode(errors="replace")) for text in texts)
    # labels may be nothing but ends of turns
    return sum(map(len, said)) / max(num_bytes, 1)
