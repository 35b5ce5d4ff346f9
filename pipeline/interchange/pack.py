"""Captured rows into sequences of one length: whole rows, one after the other, and padding behind them.

    document   [ row | row | row | padding ]   a student's attention ends where each of them begins
    packed     [ row | padding ]               it sees all that stands before, so a sequence is one row

No row is split, for the teacher saw what stands before a token in its row. A row's first token is the label of no
target. Where the teacher said nothing, after a row's last token, in the padding and where a target of no label that
counts has too few ids, stands the uniform distribution, and no label counts there.

Legend: L targets a sequence, M tokens of a row, K ids kept, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from capgap.pipeline.interchange.captures import CapturedRow
from capgap.pipeline.interchange.widths import kept, uniform
from capgap.schemas.records import Sequences, TopkTargets
from capgap.schemas.run_corpus import ContextRule

# Sequences that are not full yet. A row goes to the fullest that it fits into; of rows of 2 to 59 tokens in sequences
# of 64, sixteen leave 5.5 % of padding, and each is held in memory with its targets.
_NUM_OPEN = 16


# one is found by what it is: rows are arrays, which do not compare
@dataclass(eq=False)
class Sequence:
    """A sequence in the making: its rows, from its first token on."""

    rows: list[CapturedRow] = field(default_factory=list)
    num_tokens: int = 0


def pack(rows: Iterable[CapturedRow], seq_len: int, context: ContextRule) -> Iterator[Sequence]:
    """Sequences as they get full, then those that are left; the same rows make the same ones."""
    is_full = seq_len + 1
    open_ones: list[Sequence] = []
    for row in rows:
        fitting = [one for one in open_ones if one.num_tokens + len(row) <= is_full]
        if fitting and context == "document":
            one = max(fitting, key=lambda one: one.num_tokens)
        else:
            one = Sequence()
            open_ones.append(one)
        one.rows.append(row)
        one.num_tokens += len(row)
        # a row has two tokens at least
        if context == "packed" or one.num_tokens > is_full - 2:
            open_ones.remove(one)
            yield one
        elif len(open_ones) > _NUM_OPEN:
            fullest = max(open_ones, key=lambda one: one.num_tokens)
            open_ones.remove(fullest)
            yield fullest
    yield from open_ones


def to_sequences(packed: list[Sequence], seq_len: int, eos_id: int) -> Sequences:
    """The tokens of these sequences, padded with `eos_id`."""
    shape = (len(packed), seq_len + 1)
    tokens_BL1 = np.full(shape, eos_id, np.int32)
    starts_BL1, mask_BL1 = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for number, one in enumerate(packed):
        place = 0
        for row in one.rows:
            part = slice(place, place + len(row))
            tokens_BL1[number, part], starts_BL1[number, part] = row.tokens_M, row.starts_M
            mask_BL1[number, part] = row.mask_M
            # what stands before it is another row's
            mask_BL1[number, place] = False
            starts_BL1[number, place] |= place > 0
            place += len(row)
        starts_BL1[number, place : place + 1] = True
    return Sequences(tokens_BL1, starts_BL1, mask_BL1)


def to_topk(
    packed: list[Sequence], sequences: Sequences, top_k: int, vocab_size: int, is_ragged: bool = False
) -> TopkTargets:
    """The targets of these sequences.

    Raises:
        InputError: a target whose label counts has fewer than `top_k` ids, or none where it is ragged.
    """
    shape = sequences.tokens_BL1[:, 1:].shape
    padding = uniform(shape[0] * shape[1], top_k, vocab_size)
    ids_BLK, logprobs_BLK = padding.ids_TW.reshape(*shape, top_k), padding.logprobs_TW.reshape(*shape, top_k)
    tail_BL, labels_BL = padding.tail_T.reshape(shape), padding.label_logprobs_T.reshape(shape)
    for number, one in enumerate(packed):
        place = 0
        for row in one.rows:
            targets = kept(row, top_k, vocab_size, is_ragged)
            num = min(len(targets), shape[1] - place)
            part = slice(place, place + num)
            ids_BLK[number, part], logprobs_BLK[number, part] = targets.ids_TW[:num], targets.logprobs_TW[:num]
            tail_BL[number, part], labels_BL[number, part] = targets.tail_T[:num], targets.label_logprobs_T[:num]
            place += len(row)
    # after a row's last token comes another row's first, of which its target may say something
    is_kept_BLK = (ids_BLK == sequences.tokens_BL1[:, 1:, None]) & np.isnan(labels_BL)[..., None]
    number_D, target_D, place_D = np.nonzero(is_kept_BLK & np.isfinite(logprobs_BLK))
    labels_BL[number_D, target_D] = logprobs_BLK[number_D, target_D, place_D]
    return TopkTargets(ids_BLK, logprobs_BLK, tail_BL, labels_BL, np.zeros((*shape, 0), np.float32))
