"""Packs documents into sequences: each document follows the one before it, with an end token in between.

    [ BOS text EOS BOS te | BOS xt EOS ... ]     if documents begin with BOS, so does the rest of a document that is cut

A packer takes one document after another, and returns whole sequences on demand; tokens that do not fill a sequence yet
wait for the next document. The sequences do not depend on how often they are taken.

BOS is never a label. Neither is the first token behind the BOS of a rest, because it cannot be predicted from that BOS.

Legend: B sequences, L targets per sequence, T waiting tokens, D waiting documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from capgap.pipeline.corpus.sources import Document
from capgap.schemas.errors import InputError
from capgap.schemas.records import BoolArray, IntArray, Sequences


class Encoded(NamedTuple):
    """A document in tokens.

    Attributes:
        document: the document's name and text.
        ids: its token ids, as a list or an array; an end token is added, except to a conversation that ends with one.
        mask: which tokens of a conversation are labels; None for text, in which all are, including the end token.
    """

    document: Document
    ids: Sequence[int] | IntArray
    mask: Sequence[bool] | BoolArray | None = None


class Packed(NamedTuple):
    """Sequences, and the documents that begin in them.

    Attributes:
        sequences: the whole sequences.
        begun: for each sequence the numbers of the documents that begin in it; the packer counts documents from 0 in
            the order in which they were added.
    """

    sequences: Sequences
    begun: list[list[int]]


class AnyPacker(Protocol):
    """What every packer can do: it takes documents and returns sequences. A document that is left out has no number.

    Attributes:
        num_waiting: number of tokens that are in no sequence yet.
    """

    num_waiting: int

    def add(self, document: Encoded) -> int:
        """Add a document, and return its number of tokens with the end token, or 0 if it is left out."""

    def take(self) -> Packed:
        """Pack the waiting documents, and return the sequences that are whole."""


class Packer:
    """Packs documents one after another into sequences of `seq_len + 1` tokens, and cuts them where a sequence ends.

    Args:
        seq_len: number of targets per sequence.
        eos_id: the token that ends a document.
        long_documents: what becomes of a document that is longer than a sequence.
        bos_ids: ids with which every text begins. Nothing is put before a conversation.
    """

    def __init__(
        self,
        seq_len: int,
        eos_id: int,
        long_documents: Literal["split", "drop", "refuse"],
        bos_ids: tuple[int, ...] = (),
    ) -> None:
        self.num_waiting = self._num_begun = 0
        self._seq_len, self._eos_id, self._long, self._bos_ids = seq_len, eos_id, long_documents, bos_ids
        self._parts: list[IntArray] = []
        self._masks: list[BoolArray] = []
        self._has_bos: list[bool] = []
        # how many tokens of the first waiting document are in sequences already
        self._num_taken = 0

    def add(self, document: Encoded) -> int:
        """Add a document, and return its number of tokens with the end token, or 0 if it is left out for its length.

        Raises:
            InputError: the document is longer than a sequence and `long_documents` is `refuse`.
        """
        ids, mask = document.ids, document.mask
        begin = self._bos_ids if mask is None else ()
        end = [] if mask is not None and list(ids[-1:]) == [self._eos_id] else [self._eos_id]
        if len(begin) + len(ids) + len(end) > self._seq_len + 1 and self._long != "split":
            if self._long == "refuse":
                raise InputError(
                    "the document is longer than a sequence",
                    where=document.document.name,
                    found=f"{len(begin) + len(ids)} tokens{' and an end token' if end else ''}",
                    expected=f"at most {self._seq_len + 1} in all",
                    fix="raise corpus.seq_len, or set corpus.long_documents to split or drop",
                )
            return 0
        part = np.empty(len(begin) + len(ids) + len(end), np.int32)
        part[: len(begin)], part[len(begin) : len(begin) + len(ids)] = begin, ids
        part[len(begin) + len(ids) :] = end
        counts = np.ones(len(part), np.bool_)
        counts[: len(begin)] = False
        if mask is not None:
            counts[: len(ids)], counts[len(ids) :] = mask, False
        self._parts.append(part)
        self._masks.append(counts)
        self._has_bos.append(bool(self._bos_ids) and tuple(part[: len(self._bos_ids)]) == self._bos_ids)
        self.num_waiting += len(part)
        return len(ids) + len(end)

    def take(self) -> Packed:
        """Return every whole sequence; the tokens behind the last one keep waiting."""
        tokens_T = np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)
        mask_T = np.concatenate(self._masks) if self._masks else np.zeros(0, np.bool_)
        begins_D = np.cumsum([0, *(len(part) for part in self._parts)])
        begins_D[0] = -self._num_taken
        starts_T = np.zeros(len(tokens_T), dtype=np.bool_)
        begun_D = begins_D[:-1]
        starts_T[begun_D[(begun_D >= 0) & (begun_D < len(tokens_T))]] = True
        rows = cut_rows(begins_D, np.array(self._has_bos, np.bool_), self._seq_len + 1, len(self._bos_ids))
        shape = (len(rows), self._seq_len + 1)
        made = Sequences(np.empty(shape, np.int32), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_))
        for number, (first, num_put, is_rest) in enumerate(rows):
            part = slice(first, first + shape[1] - num_put)
            made.tokens_BL1[number, :num_put] = self._bos_ids[:num_put]
            made.tokens_BL1[number, num_put:] = tokens_T[part]
            made.starts_BL1[number, num_put:], made.mask_BL1[number, num_put:] = starts_T[part], mask_T[part]
            made.mask_BL1[number, num_put] &= not is_rest
        if rows:
            self._keep(rows[-1][0] + shape[1] - rows[-1][1], tokens_T, mask_T, begins_D)
        return Packed(made, self._begun(made))

    def _begun(self, made: Sequences) -> list[list[int]]:
        begun = []
        for num_starts in made.starts_BL1.sum(axis=1).tolist():
            begun.append(list(range(self._num_begun, self._num_begun + num_starts)))
            self._num_begun += num_starts
        return begun

    def _keep(self, first: int, tokens_T: IntArray, mask_T: BoolArray, begins_D: npt.NDArray[np.int64]) -> None:
        """Keep the tokens from `first` on waiting, and drop those before."""
        document = int(np.searchsorted(begins_D[1:], first, side="right"))
        self.num_waiting = len(tokens_T) - first
        self._has_bos = self._has_bos[document:]
        if not self.num_waiting:
            self._parts, self._masks, self._num_taken = [], [], 0
            return
        self._num_taken = first - int(begins_D[document])
        ends = begins_D[document + 1 :]
        # copies, so that the memory of the tokens that are in sequences already is freed
        self._parts = [part.copy() for part in np.split(tokens_T[first:], ends[:-1] - first)]
        self._masks = [part.copy() for part in np.split(mask_T[first:], ends[:-1] - first)]


def cut_rows(
    begins_D: npt.NDArray[np.int64], has_bos_D: npt.NDArray[np.bool_], size: int, num_bos: int
) -> list[tuple[int, int, bool]]:
    """Cut a stream of documents into sequences, and return three values for each.

    These are the first token of the stream in the sequence, the number of BOS ids that are put before it, and whether
    its BOS ids are followed by text from the middle of a document.

    Args:
        begins_D: place of each document's first token in the stream, and the end of the stream behind the last.
        has_bos_D: whether each document begins with the BOS ids.
        size: number of tokens per sequence.
        num_bos: number of BOS ids.
    """
    rows: list[tuple[int, int, bool]] = []
    first, document = 0, 0
    while first < begins_D[-1]:
        while begins_D[document + 1] <= first:
            document += 1
        # if the cut falls within the BOS ids of a document, only those before the cut are put again
        num_put = int(min(num_bos, first - begins_D[document])) if has_bos_D[document] else 0
        if first + size - num_put > begins_D[-1]:
            break
        rows.append((first, num_put, bool(has_bos_D[document]) and first - begins_D[document] > num_bos))
        first += size - num_put
    return rows
