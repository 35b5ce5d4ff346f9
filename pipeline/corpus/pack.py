"""Documents into packed sequences: each starts a new one where the last ended, an end token in between.

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
) -> Packed:
    """Pack documents into sequences of `seq_len + 1` tokens.

    Raises:
        InputError: a document is longer than a sequence and `long_documents` is `refuse`.
    """
    parts: list[npt.NDArray[np.int32]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    num_dropped = num_text_bytes = 0
    for document, ids, mask in documents:
        end = [] if mask is not None and ids[-1:] == [eos_id] else [eos_id]
        if len(ids) + len(end) > seq_len + 1 and long_documents != "split":
            if long_documents == "refuse":
                raise InputError(
                    "the document is longer than a sequence",
                    where=document.name,
                    found=f"{len(ids)} tokens{' and an end token' if end else ''}",
                    expected=f"at most {seq_len + 1} in all",
                    fix="raise corpus.seq_len, or set corpus.long_documents to split or drop",
                )
            num_dropped += 1
            continue
        num_text_bytes += len(document.text.encode())
        parts.append(np.array([*ids, *end], dtype=np.int32))
        counts = np.ones(len(parts[-1]), np.bool_)
        if mask is not None:
            counts[: len(ids)], counts[len(ids) :] = mask, False
        masks.append(counts)
    tokens_T = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    mask_T = np.concatenate(masks) if masks else np.zeros(0, np.bool_)
    starts_T = np.zeros(len(tokens_T), dtype=np.bool_)
    starts_T[np.cumsum([0, *(len(part) for part in parts[:-1])]) if parts else []] = True
    num_sequences = len(tokens_T) // (seq_len + 1)
    kept = num_sequences * (seq_len + 1)
    shape = (num_sequences, seq_len + 1)
    sequences = Sequences(tokens_T[:kept].reshape(shape), starts_T[:kept].reshape(shape), mask_T[:kept].reshape(shape))
    return Packed(
        sequences,
        num_documents=int(starts_T[:kept].sum()),
        num_dropped=num_dropped,
        num_text_bytes=num_text_bytes,
        num_text_tokens=len(tokens_T),
        num_cut_tokens=len(tokens_T) - kept,
    )
