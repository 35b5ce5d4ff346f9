"""Reads a shard of a cache as one stream of tokens, document after document, with the teacher's logprob of each.

BOS tokens are left out: they are no text, and the student's own BOS takes their place. The end of a document stays, and
counts as one byte that no text holds.

Legend: B sequences, L targets per sequence, K ids per target, N targets, W tokens of all sequences, T tokens of the
stream, D documents.
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
        ids_T: the token ids [T], int64.
        is_end_T: whether each token ends a document [T].
        first_D: place of the first token of each document [D]; none is empty.
        is_begun: whether the first document began before this shard.
        logprobs_T: the teacher's logprob of each token [T], float64, nats; NaN where it is not known.
        counts_T: whether each token may be learnt [T].
        longer: the teacher's probability of longer tokens in the place of each token.
        top: the teacher's top-k tokens; None if they are not to be projected.
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
    """The most probable of the top-k tokens at each target of a shard.

    Attributes:
        ids_NK: the token ids by falling probability [N, K], int32.
        logprobs_NK: the logprob of each of these tokens [N, K], float32, nats; -inf where there is none.
        rest_N: the probability of all other ids [N], float32.
        row_T: the target at which each token of the stream is the real next token [T]; -1 if there is none.
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
    """Join the blocks of a shard into one stream.

    Args:
        blocks: sequences and targets of the shard, in order.
        facts: the facts of the cache.
        num_ids: number of ids per target of the cache: samples of a `sampled` recording, top-k tokens of a `topk` one.
        tokenizer: the teacher's tokenizer.
        is_shared_V: which of the teacher's tokens the student's vocabulary has as well.
        num_top: how many of the top-k tokens are read for projection; 0 for none.

    Raises:
        InputError: a document does not begin with the BOS of the cache, holds a special token, or continues behind its
            end token.
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
    # number the documents before BOS is left out: a BOS may end a sequence, with all of its text in the next one
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
    """Join the top-k tokens of all blocks; `is_text_W` says which tokens of the sequences are in the stream."""
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
    """Copy the first top-k tokens of a block, so that the memory of the others can be freed."""
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
    # the first text token of a sequence that continues a document may be learnt, but the teacher has no logprob of it
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
    """Return where BOS tokens stand [B, L + 1]: before each document, and before its rest in the next sequence."""
    is_bos_BL1 = np.zeros(sequences.tokens_BL1.shape, np.bool_)
    if facts.bos_ids:
        is_bos_BL1 |= sequences.starts_BL1
        is_bos_BL1[:, 0] = True
        if (sequences.tokens_BL1[is_bos_BL1] != facts.bos_ids[0]).any():
            raise InputError(
                "a document of the cache does not begin as its tokenizer's documents do",
                where=where,
                expected=f"the id {facts.bos_ids[0]} before each document",
                fix="make the cache again from a corpus of texts",
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
            expected="an end only as a document's last token",
            fix="align a cache that capgap made from texts",
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
            fix="align a cache of plain text; special tokens within documents have no counterpart in another tokenizer",
        )
