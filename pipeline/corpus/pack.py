"""Documents into packed sequences: each starts a new one where the last ended, an end token in between.

    [ BOS text EOS BOS te | BOS xt EOS ... ]     where documents begin with BOS, so does the rest of one that is split

BOS is never a label, and neither is the first token behind one that stands before such a rest: it can be told from
nothing.

Legend: B sequences, L targets a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from capgap.pipeline.corpus.sources import Document
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences


class Encoded(NamedTuple):
    """A document in tokens.

    Attributes:
        document: name and text.
        ids: its tokens; an end token is added, except to a conversation that ends with one.
        mask: of a conversation, which of them count as labels; None for text, in which all do, the end token too.
    """

    document: Document
    ids: list[int]
    mask: list[bool] | None = None


@dataclass(frozen=True)
class Packed:
    """Packed sequences and what became of the text.

    Attributes:
        sequences: whole sequences only.
        num_documents: documents in them, at least in part.
        num_dropped: documents left out because they were too long.
        num_text_bytes: UTF-8 bytes of the kept documents.
        num_text_tokens: tokens of the kept documents, end tokens included.
        num_cut_tokens: tokens at the very end that did not fill a sequence.
        num_dropped_answers: of whole conversations, left out because they did not end within a sequence.
    """

    sequences: Sequences
    num_documents: int
    num_dropped: int
    num_text_bytes: int
    num_text_tokens: int
    num_cut_tokens: int
    num_dropped_answers: int = 0


def pack(
    documents: Iterable[Encoded],
    seq_len: int,
    eos_id: int,
    long_documents: Literal["split", "drop", "refuse"],
    bos_ids: tuple[int, ...] = (),
) -> Packed:
    """Pack documents into sequences of `seq_len + 1` tokens.

    Args:
        documents: in their order.
        seq_len: targets of a sequence.
        eos_id: ends a document.
        long_documents: what becomes of one that is longer than a sequence.
        bos_ids: begin every text. A conversation begins as it comes.

    Raises:
        InputError: a document is longer than a sequence and `long_documents` is `refuse`.
    """
    parts: list[npt.NDArray[np.int32]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    num_dropped = num_text_bytes = num_text_tokens = 0
    for document, ids, mask in documents:
        begin = bos_ids if mask is None else ()
        end = [] if mask is not None and ids[-1:] == [eos_id] else [eos_id]
        if len(begin) + len(ids) + len(end) > seq_len + 1 and long_documents != "split":
            if long_documents == "refuse":
                raise InputError(
                    "the document is longer than a sequence",
                    where=document.name,
                    found=f"{len(begin) + len(ids)} tokens{' and an end token' if end else ''}",
                    expected=f"at most {seq_len + 1} in all",
                    fix="raise corpus.seq_len, or set corpus.long_documents to split or drop",
                )
            num_dropped += 1
            continue
        num_text_bytes += len(document.text.encode())
        num_text_tokens += len(ids) + len(end)
        parts.append(np.array([*begin, *ids, *end], dtype=np.int32))
        counts = np.ones(len(parts[-1]), np.bool_)
        counts[: len(begin)] = False
        if mask is not None:
            counts[: len(ids)], counts[len(ids) :] = mask, False
        masks.append(counts)
    sequences, num_used = _sequences(parts, masks, seq_len, bos_ids)
    return Packed(
        sequences,
        num_documents=int(sequences.starts_BL1.sum()),
        num_dropped=num_dropped,
        num_text_bytes=num_text_bytes,
        num_text_tokens=num_text_tokens,
        num_cut_tokens=sum(map(len, parts)) - num_used,
    )


def _sequences(
    parts: list[npt.NDArray[np.int32]], masks: list[npt.NDArray[np.bool_]], seq_len: int, bos_ids: tuple[int, ...]
) -> tuple[Sequences, int]:
    """The whole sequences, and how many tokens of the documents are in them."""
    tokens_T = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    mask_T = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
    begins_D = np.cumsum([0, *(len(part) for part in parts)])
    starts_T = np.zeros(len(tokens_T), dtype=np.bool_)
    starts_T[begins_D[:-1]] = True
    has_bos_D = np.array([bool(bos_ids) and tuple(part[: len(bos_ids)]) == bos_ids for part in parts], np.bool_)
    rows = _rows(begins_D, has_bos_D, seq_len + 1, len(bos_ids))
    shape = (len(rows), seq_len + 1)
    made = Sequences(np.empty(shape, np.int32), np.zeros(shape, np.bool_), np.zeros(shape, np.bool_))
    for number, (first, num_put, is_rest) in enumerate(rows):
        part = slice(first, first + shape[1] - num_put)
        made.tokens_BL1[number, :num_put], made.tokens_BL1[number, num_put:] = bos_ids[:num_put], tokens_T[part]
        made.starts_BL1[number, num_put:], made.mask_BL1[number, num_put:] = starts_T[part], mask_T[part]
        made.mask_BL1[number, num_put] &= not is_rest
    return made, rows[-1][0] + shape[1] - rows[-1][1] if rows else 0


def _rows(
    begins_D: npt.NDArray[np.int64], has_bos_D: npt.NDArray[np.bool_], size: int, num_bos: int
) -> list[tuple[int, int, bool]]:
    """For each sequence the first token that it takes, how many ids are put before that, and whether that is the rest
    of a document whose beginning stands elsewhere."""
    rows: list[tuple[int, int, bool]] = []
    first, document = 0, 0
    while first < begins_D[-1]:
        while begins_D[document + 1] <= first:
            document += 1
        # a document that was begun just before the cut has some of them already, and the rest follows
        num_put = int(min(num_bos, first - begins_D[document])) if has_bos_D[document] else 0
        if first + size - num_put > begins_D[-1]:
            break
        rows.append((first, num_put, bool(has_bos_D[document]) and first - begins_D[document] > num_bos))
        first += size - num_put
    return rows
