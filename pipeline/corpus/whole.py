"""Whole conversations in rows of one length: as many as fit, in any order, and padding behind them.

    row 0:  [ conversation | conversation | padding ]     each a document, and so is the padding, which counts nothing
    row 1:  [ conversation | padding                ]

Legend: B rows, L targets a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from capgap.pipeline.corpus.pack import Encoded
from capgap.schemas.records import Sequences


def in_whole_rows(conversations: Sequence[Encoded], seq_len: int, fill_id: int, packing: bool) -> Sequences:
    """Rows of `seq_len + 1` tokens.

    Args:
        conversations: each of at most that many tokens, with a mask.
        seq_len: targets of a row.
        fill_id: the token of the padding.
        packing: several in a row; best fit, the longest first, which leaves little padding.
    """
    rows = _best_fit([len(one.ids) for one in conversations], seq_len + 1) if packing else _one_each(conversations)
    shape = (len(rows), seq_len + 1)
    tokens_BL1, starts_BL1, mask_BL1 = np.full(shape, fill_id, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        place = 0
        for one in (conversations[index] for index in row):
            part = slice(place, place + len(one.ids))
            tokens_BL1[number, part], mask_BL1[number, part] = one.ids, one.mask
            # nothing is before a first token from which it could be told
            starts_BL1[number, place], mask_BL1[number, place] = True, False
            place += len(one.ids)
        if place <= seq_len:
            starts_BL1[number, place] = True
    return Sequences(tokens_BL1, starts_BL1, mask_BL1)


def _one_each(conversations: Sequence[Encoded]) -> list[list[int]]:
    return [[index] for index in range(len(conversations))]


def _best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of indices: each length, from the longest down, goes where it leaves the least room."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(rooms, lengths[index])
        if at == len(rooms):
            rows.append([])
            number, left = len(rows) - 1, room
        else:
            left = rooms[at]
            number = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        rows[number].append(index)
        left -= lengths[index]
        if left not in with_room:
            insort(rooms, left)
        with_room[left].append(number)
    return rows
