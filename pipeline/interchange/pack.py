"""Captured rows packed into sequences of one length: whole rows, one after the other, and padding after them.

    document   [ row | row | row | padding ]   a student's attention does not reach across the start of a row
    packed     [ row | padding ]               attention reaches the whole sequence, so a sequence is one row

No row is split, because the teacher saw all earlier tokens of the row. A row's first token is the label of no target.
Some positions have no target of the teacher: after a row's last token, in the padding, and where a target whose label
does not count has too few ids. They get the uniform distribution, and no label counts there.

Legend: L targets of a sequence, M tokens of a row, K kept ids, B sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from capgap.pipeline.interchange.captures import CapturedRow
from capgap.pipeline.interchange.widths import kept, uniform
from capgap.schemas.records import Sequences, TopkTargets
from capgap.schemas.run_corpus import ContextRule

# Number of sequences that are filled at once. A row goes to the fullest that it fits into. Rows of 2 to 59 tokens in
# sequences of 64 leave 5.5 % of padding with sixteen; each open sequence is held in memory with its targets.
_NUM_OPEN = 16


# compared by identity: rows are arrays, which cannot be compared with ==
@dataclass(eq=False)
class Sequence:
    """A sequence that is being filled: its rows, from its first token on."""

    rows: list[CapturedRow] = field(default_factory=list)
    num_tokens: int = 0


def pack(rows: Iterable[CapturedRow], seq_len: int, context: ContextRule) -> Iterator[Sequence]:
    """Yield sequences as they become full, and the unfinished ones at the end; equal rows give equal sequences."""
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
        # a row has at least two tokens
        if context == "packed" or one.num_tokens > is_full - 2:
            open_ones.remove(one)
            yield one
        elif len(open_ones) > _NUM_OPEN:
            fullest = max(open_ones, key=lambda one: one.num_tokens)
            open_ones.remove(fullest)
            yield fullest
    yield from open_ones


def to_sequences(packed: list[Sequence], seq_len: int, eos_id: int) -> Sequences:
    """Return the tokens of these sequences, padded with `eos_id`."""
    shape = (len(packed), seq_len + 1)
    tokens_BL1 = np.full(shape, eos_id, np.int32)
    starts_BL1, mask_BL1 = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for number, one in enumerate(packed):
        place = 0
        for row in one.rows:
            part = slice(place, place + len(row))
            tokens_BL1[number, part], starts_BL1[number, part] = row.tokens_M, row.starts_M
            mask_BL1[number, part] = row.mask_M
            # the token before belongs to another row, so its target does not predict this one
            mask_BL1[number, place] = False
            starts_BL1[number, place] |= place > 0
            place += len(row)
        starts_BL1[number, place : place + 1] = True
    return Sequences(tokens_BL1, starts_BL1, mask_BL1)


def to_topk(
    packed: list[Sequence], sequences: Sequences, top_k: int, vocab_size: int, is_ragged: bool = False
) -> TopkTargets:
    """Return the targets of these sequences.

    Raises:
        InputError: A target whose label counts has fewer than `top_k` ids, or no ids where `is_ragged` is set.
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
    # the target of a row's last token may hold the first token of the next row, whose logprob must then agree
    is_kept_BLK = (ids_BLK == sequences.tokens_BL1[:, 1:, None]) & np.isnan(labels_BL)[..., None]
    number_D, target_D, place_D = np.nonzero(is_kept_BLK & np.isfinite(logprobs_BLK))
    labels_BL[number_D, target_D] = logprobs_BLK[number_D, target_D, place_D]
    return TopkTargets(ids_BLK, logprobs_BLK, tail_BL, labels_BL, np.zeros((*shape, 0), np.float32))
