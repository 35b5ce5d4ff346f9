"""A shard of a cache as one stream of tokens, document after document, with what the teacher said of each.

Tokens that begin documents are left out: they are no text, and the student's own are put in their place. The end of a
document stays, as one byte that no text has.

Legend: B sequences, L targets a sequence, T tokens of the stream, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.align.chunking import Longer, longer_tokens
from capgap.pipeline.align.token_bytes import NO_TEXT, Ints, TextTokenizer
from capgap.schemas.errors import InputError
from capgap.schemas.facts import TextFacts
from capgap.schemas.records import ChunkTargets, SampledTargets, Sequences, Targets, TopkTargets


@dataclass(frozen=True)
class TeacherStream:
    """The teacher's tokens of one shard.

    Attributes:
        ids_T: the tokens.
        is_end_T: whether each ends a document.
        first_D: the first token of each document; all have tokens.
        is_begun: whether the first document began before this shard.
        logprobs_T: the teacher's of each token, float64, nats; NaN where it is not known.
        counts_T: whether it may be learnt.
        longer: what the teacher gave to longer tokens in its place.
        top: the teacher's top-k tokens, where they are to be projected.
    """

    ids_T: Ints
    is_end_T: npt.NDArray[np.bool_]
    first_D: Ints
    is_begun: bool
    logprobs_T: npt.NDArray[np.float64]
    counts_T: npt.NDArray[np.bool_]
    longer: Longer
    top: TopTokens | None = None


@dataclass(frozen=True)
class TopTokens:
    """The first of the top-k tokens of a shard's targets.

    Attributes:
        ids_NK: the tokens by falling probability [N, K], int32.
        logprobs_NK: theirs [N, K], float32, nats; -inf where there is none.
        rest_N: probability of all other ids [N], float32.
        row_T: which row stands for each token of the stream; -1 where none does.
    """

    ids_NK: npt.NDArray[np.int32]
    logprobs_NK: npt.NDArray[np.float32]
    rest_N: npt.NDArray[np.float32]
    row_T: Ints


def read_stream(
    blocks: Iterable[tuple[Sequences, Targets | None]],
    facts: TextFacts,
    num_ids: int,
    tokenizer: TextTokenizer,
    is_shared_V: npt.NDArray[np.bool_],
    num_top: int = 0,
) -> TeacherStream:
    """The stream of a shard's blocks.

    Args:
        blocks: of the shard, in order.
        facts: of the cache.
        num_ids: of its codec.
        tokenizer: the teacher's.
        is_shared_V: which of its tokens the student has as well.
        num_top: how many of the top-k tokens are wanted too.

    Raises:
        InputError: a document does not begin as all do, holds a special token, or goes on behind its end.
    """
    parts: list[tuple[npt.NDArray[np.generic], ...]] = []
    tops: list[tuple[npt.NDArray[np.generic], ...]] = []
    for sequences, targets in blocks:
        assert targets is not None and not isinstance(targets, ChunkTargets), "the cache of a teacher has its targets"
        parts.append(_read_block(sequences, targets, facts, num_ids, tokenizer, is_shared_V))
        if num_top and isinstance(targets, TopkTargets):
            tops.append(_first_of(targets, num_top))
    joined = (np.concatenate(part) for part in zip(*parts, strict=True))
    is_text_T, ids_T, starts_T, logprobs_T, counts_T, all_T, other_T = joined
    # a beginning may be the last token of a sequence, and its text all in the next one
    document_T = np.cumsum(starts_T)[is_text_T]
    ids_T, logprobs_T, counts_T, all_T, other_T = (
        one[is_text_T] for one in (ids_T, logprobs_T, counts_T, all_T, other_T)
    )
    is_end_T = ids_T == facts.tokenizer.eos_id
    _require_text(ids_T[~is_end_T], tokenizer)
    first_D = np.flatnonzero(np.diff(document_T, prepend=-1))
    _require_last(is_end_T, first_D, tokenizer.where)
    is_begun = bool(len(document_T)) and int(document_T[0]) == 0
    return TeacherStream(
        ids_T.astype(np.int64),
        is_end_T,
        first_D,
        is_begun,
        logprobs_T.astype(np.float64),
        counts_T.astype(np.bool_),
        Longer(all_T.astype(np.float32), other_T.astype(np.float32)),
        _top_tokens(tops, is_text_T.astype(np.bool_)) if tops else None,
    )


def _top_tokens(tops: list[tuple[npt.NDArray[np.generic], ...]], is_text_W: npt.NDArray[np.bool_]) -> TopTokens:
    """Of the targets of all blocks; of every token, those that begin documents too, it is known whether it is text."""
    ids_BLK, logprobs_BLK, rest_BL = (np.concatenate(one) for one in zip(*tops, strict=True))
    num_sequences, length, num_top = ids_BLK.shape
    row_BL1 = np.full((num_sequences, length + 1), -1, np.int64)
    row_BL1[:, 1:] = np.arange(num_sequences * length).reshape(num_sequences, length)
    return TopTokens(
        ids_BLK.reshape(-1, num_top).astype(np.int32, copy=False),
        logprobs_BLK.reshape(-1, num_top).astype(np.float32, copy=False),
        rest_BL.ravel().astype(np.float32, copy=False),
        row_BL1.ravel()[is_text_W],
    )


def _first_of(targets: TopkTargets, num_top: int) -> tuple[npt.NDArray[np.generic], ...]:
    """Copies, so that the rest of a block is not kept."""
    rest_BL = targets.tail_BL + np.exp(targets.logprobs_BLK[..., num_top:]).sum(axis=2)
    return targets.ids_BLK[..., :num_top].copy(), targets.logprobs_BLK[..., :num_top].copy(), rest_BL


def _read_block(
    sequences: Sequences,
    targets: TopkTargets | SampledTargets,
    facts: TextFacts,
    num_ids: int,
    tokenizer: TextTokenizer,
    is_shared_V: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.generic], ...]:
    tokens_BL1, starts_BL1, counts_BL1 = sequences.tokens_BL1, sequences.starts_BL1, sequences.mask_BL1.copy()
    is_bos_BL1 = _beginnings(sequences, facts, tokenizer.where)
    shape = tokens_BL1.shape
    logprobs_BL1 = np.full(shape, np.nan, np.float32)
    logprobs_BL1[:, 1:] = targets.label_logprobs_BL
    # what a sequence begins with has nothing before it, wherever in its document it stands
    place = len(facts.bos_ids)
    is_rest_B = ~starts_BL1[:, 0]
    counts_BL1[is_rest_B, place] = True
    logprobs_BL1[is_rest_B, place] = np.nan
    if not place:
        counts_BL1[:, 0] = True
    longer = longer_tokens(targets, tokens_BL1[:, 1:].ravel().astype(np.int64), num_ids, tokenizer.table, is_shared_V)
    all_BL1, other_BL1 = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    all_BL1[:, 1:] = longer.all_N.reshape(shape[0], -1)
    other_BL1[:, 1:] = longer.other_N.reshape(shape[0], -1)
    every = (~is_bos_BL1, tokens_BL1, starts_BL1, logprobs_BL1, counts_BL1, all_BL1, other_BL1)
    return tuple(one.ravel() for one in every)


def _beginnings(sequences: Sequences, facts: TextFacts, where: str) -> npt.NDArray[np.bool_]:
    """Where a token stands that begins documents, and what is left of one in the next sequence."""
    is_bos_BL1 = np.zeros(sequences.tokens_BL1.shape, np.bool_)
    if facts.bos_ids:
        is_bos_BL1 |= sequences.starts_BL1
        is_bos_BL1[:, 0] = True
        if (sequences.tokens_BL1[is_bos_BL1] != facts.bos_ids[0]).any():
            raise InputError(
                "a document of the cache does not begin as its tokenizer's documents do",
                where=where,
                expected=f"the id {facts.bos_ids[0]} before each document",
                fix="make the cache again of a corpus of texts",
            )
    return is_bos_BL1


def _require_last(is_end_T: npt.NDArray[np.bool_], first_D: Ints, where: str) -> None:
    last_D = np.append(first_D[1:], len(is_end_T)) - 1
    num_within = int(is_end_T.sum() - is_end_T[last_D].sum()) if len(is_end_T) else 0
    if num_within:
        raise InputError(
            "a document of the cache goes on behind its end",
            where=where,
            found=f"{num_within:,} ends within documents of one shard",
            expected="none but as a document's last token",
            fix="align a cache that capgap made of texts",
        )


def _require_text(ids_T: npt.NDArray[np.generic], tokenizer: TextTokenizer) -> None:
    ids_V = np.unique(ids_T).astype(np.int64)
    special_V = ids_V[tokenizer.table.length_V[ids_V] == NO_TEXT]
    if len(special_V):
        number = int(special_V[0])
        raise InputError(
            "a document holds a token that spells no text",
            where=tokenizer.where,
            found=f"the id {number}, {tokenizer.table.tokens.get(number, 'of no token')!a}",
            expected="text between the beginning and the end of a document",
            fix="align a cache of plain text; special tokens within documents have none in another tokenizer",
        )
