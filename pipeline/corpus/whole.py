"""Packs whole conversations into rows of one length, as many in each as fit, with padding behind them.

    row 0:  [ conversation | conversation | padding ]     each is a document of its own; the padding too, without labels
    row 1:  [ conversation | padding                ]

Legend: B rows, L targets per row.
"""

from __future__ import annotations

import logging
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from capgap.pipeline.corpus.bad_records import BadRecords
from capgap.pipeline.corpus.pack import Encoded, Packed
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.stage.progress import progress
from capgap.schemas.errors import BadRecordError
from capgap.schemas.records import Sequences

if TYPE_CHECKING:
    from capgap.pipeline.corpus.conversations import ChatFormat, Turns

_LOG = logging.getLogger("capgap")


@dataclass(frozen=True)
class WholeConversations:
    """Conversations in tokens.

    Attributes:
        rows: the tokens of the conversations: one row for each, or several if answers need prompts of their own.
        num_conversations: number of conversations in `rows`.
        num_answers: number of answers in `rows`.
        num_dropped_conversations: number of conversations left out because none of their answers ends within one row.
        num_dropped_answers: number of answers left out because they, or an earlier answer of the same conversation, do
            not end within one row.
    """

    rows: list[Encoded]
    num_conversations: int
    num_answers: int
    num_dropped_conversations: int
    num_dropped_answers: int


def encode_whole(
    chat: ChatFormat, documents: Sequence[Document], seq_len: int, title: str, bad: BadRecords
) -> WholeConversations:
    """Encode conversations so that each fits into one row of `seq_len + 1` tokens, and log what has to be left out.

    Args:
        chat: the chat format that encodes a conversation.
        documents: the conversations.
        seq_len: number of targets per row.
        title: name of the work in the progress and in the log.
        bad: what becomes of conversations that cannot be used.

    Raises:
        BadRecordError: a conversation cannot be used, and `bad` stops at such a record.
    """
    made: list[Turns] = []
    with progress(title, len(documents), "conversations") as meter:
        for document in documents:
            try:
                made.append(chat.encode(document, seq_len + 1))
            except BadRecordError as error:
                bad.refuse(error)
                continue
            meter.advance(tokens=sum(len(row.ids) for row in made[-1].rows))
    num_empty = sum(not turns.rows for turns in made)
    num_dropped = sum(turns.num_dropped for turns in made)
    say_left_out(title, num_dropped, num_empty, seq_len)
    rows = [row for turns in made for row in turns.rows]
    return WholeConversations(
        rows, len(made) - num_empty, sum(turns.num_answers for turns in made), num_empty, num_dropped
    )


def say_left_out(title: str, num_answers: int, num_conversations: int, seq_len: int) -> None:
    """Log how many answers were left out because they do not end within a row of `seq_len + 1` tokens, if any were."""
    if num_answers:
        text = "%s: left out %d answers that do not end within a row of %d tokens, among them all of %d conversations"
        _LOG.warning(text, title, num_answers, seq_len + 1, num_conversations)


class WholePacker:
    """Packs whole conversations into rows of `seq_len + 1` tokens; conversations that wait together may share a row.

    Args:
        seq_len: number of targets per row.
        fill_id: the token id of the padding.
    """

    def __init__(self, seq_len: int, fill_id: int) -> None:
        self.num_waiting = self._num_taken = 0
        self._seq_len, self._fill_id = seq_len, fill_id
        self._waiting: list[Encoded] = []

    def add(self, document: Encoded) -> int:
        """Add one conversation to those waiting to be packed, and return its number of tokens.

        It must fit into one row.
        """
        # arrays take less memory than lists, and a million tokens may wait
        ids, mask = np.array(document.ids, np.int32), np.array(document.mask, np.bool_)
        self._waiting.append(Encoded(document.document, ids, mask))
        self.num_waiting += len(ids)
        return len(ids)

    def take(self) -> Packed:
        """Pack every waiting conversation into rows and return them."""
        waiting, self._waiting, self.num_waiting = self._waiting, [], 0
        rows = best_fit([len(one.ids) for one in waiting], self._seq_len + 1)
        first, self._num_taken = self._num_taken, self._num_taken + len(waiting)
        begun = [[first + index for index in row] for row in rows]
        return Packed(_laid_out(waiting, rows, self._seq_len, self._fill_id), begun)


def in_whole_rows(conversations: Sequence[Encoded], seq_len: int, fill_id: int, packing: bool = True) -> Sequences:
    """Lay out whole conversations in rows of `seq_len + 1` tokens.

    Args:
        conversations: the conversations, each of at most `seq_len + 1` tokens and with a mask.
        seq_len: number of targets per row.
        fill_id: the token id of the padding.
        packing: whether to pack several conversations into a row, by best fit with the longest first.
    """
    rows = best_fit([len(one.ids) for one in conversations], seq_len + 1) if packing else _one_each(conversations)
    return _laid_out(conversations, rows, seq_len, fill_id)


def _laid_out(conversations: Sequence[Encoded], rows: list[list[int]], seq_len: int, fill_id: int) -> Sequences:
    """Lay out the conversations in rows, each of which is given as a list of their indices."""
    shape = (len(rows), seq_len + 1)
    tokens_BL1, starts_BL1, mask_BL1 = np.full(shape, fill_id, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for number, row in enumerate(rows):
        place = 0
        for one in (conversations[index] for index in row):
            part = slice(place, place + len(one.ids))
            tokens_BL1[number, part], mask_BL1[number, part] = one.ids, one.mask
            # a first token is no label, because no token before it could predict it
            starts_BL1[number, place], mask_BL1[number, place] = True, False
            place += len(one.ids)
        if place <= seq_len:
            starts_BL1[number, place] = True
    return Sequences(tokens_BL1, starts_BL1, mask_BL1)


def _one_each(conversations: Sequence[Encoded]) -> list[list[int]]:
    return [[index] for index in range(len(conversations))]


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack lengths into rows of `room` by best fit, the longest first, and return the indices of each row."""
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
