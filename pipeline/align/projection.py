"""Projects the teacher's top-k tokens to tokens of the student, at chunks that are one token in both tokenizers.

    teacher's top-k   ` the` 0.6   ` a` 0.2   ` 12` 0.1   ` 1` 0.02        the student has no ` 12`, and splits digits
    projected         ` the` 0.6   ` a` 0.2   tail 0.2

A token that both vocabularies have may have another meaning in each. Before the text ` 12`, a teacher with this token
does not predict ` 1`, and a student without it must. So a token is added to the tail in two cases: if the teacher gives
too large a share to longer tokens that the student does not have; and if the student has longer tokens that the teacher
does not have, unless the text shows that both tokenizers use the token at the same places. (Projection to the tokens
that both vocabularies have, and how digits break it: arXiv 2605.21699.)

Legend: T teacher's tokens, U student's tokens, C chunks, B sequences, L targets per sequence, N targets of the cache,
R projected targets, K ids per target, V ids of the teacher.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.align.chunking import Chunks
from capgap.pipeline.align.stream import TopTokens
from capgap.pipeline.align.token_bytes import Ints, TextTokenizer, TokenBytes
from capgap.schemas.records import ProjectedTargets

Flags = npt.NDArray[np.bool_]

# tokens with a smaller logprob are added to the tail: their probability is below the rounding of the others
_LEAST_LOGPROB = -30.0
# number of targets that are compared at once, each of which takes K x K numbers
_ROWS = 2048


@dataclass(frozen=True)
class BothTokens:
    """The teacher's vocabulary compared with the student's by the bytes of the tokens.

    Attributes:
        student_V: the student's id with the bytes of each of the teacher's ids [V]; -1 if it has none.
        goes_on_V: whether the student has longer tokens that begin with these bytes and that the teacher lacks [V].
        table: the bytes of the teacher's tokens.
    """

    student_V: Ints
    goes_on_V: Flags
    table: TokenBytes

    @classmethod
    def of(cls, teacher: TextTokenizer, teacher_eos: int, student: TextTokenizer, student_eos: int) -> BothTokens:
        """Compare two vocabularies; tokens of equal bytes are the same token, and so are the two ends of documents."""
        mine, theirs = _ids_of(teacher), _ids_of(student)
        student_V = np.full(len(teacher.table.length_V), -1, np.int64)
        goes_on_V = np.zeros(len(student_V), np.bool_)
        lone = sorted(text for text in theirs if text not in mine)
        for text, token in mine.items():
            student_V[token] = theirs.get(text, -1)
            place = bisect_right(lone, text)
            goes_on_V[token] = place < len(lone) and lone[place].startswith(text)
        student_V[teacher_eos] = student_eos
        return cls(student_V, goes_on_V, teacher.table)


def _ids_of(tokenizer: TextTokenizer) -> dict[bytes, int]:
    """Return the id of each token's bytes; of several, such as a letter and its byte, the id that encoding gives."""
    found: dict[bytes, int] = {}
    for token in np.flatnonzero(tokenizer.table.length_V > 0).tolist():
        text = tokenizer.table.bytes_of(token)
        if text in found:
            ids = tokenizer.encode([text.decode(errors="replace")])[0]
            token = found[text] if ids and ids[-1] == found[text] else token
        found[text] = token
    return found


@dataclass(frozen=True)
class Singles:
    """The chunks that are one token in both tokenizers.

    Attributes:
        place_U: place of the teacher's token that is the same chunk as each of the student's tokens [U]; -1 if none is.
        is_same_V: which of the teacher's ids both tokenizers use in the same places [V].
    """

    place_U: Ints
    is_same_V: Flags

    @classmethod
    def of(
        cls, chunks: Chunks, kept_C: Flags, ids_T: Ints, ids_U: Ints, allowed_T: Flags, both: BothTokens, share: float
    ) -> Singles:
        """Find the kept chunks that are one token in both tokenizers.

        Args:
            chunks: the chunks of the text.
            kept_C: which chunks the student learns from.
            ids_T: the teacher's token ids.
            ids_U: the student's token ids.
            allowed_T: which of the teacher's tokens may begin a chunk that is compared.
            both: the comparison of the two vocabularies.
            share: a token of which the student has longer ones is used in the same places if at least this share of the
                chunks that begin with it are this one token in both tokenizers.
        """
        first_T, first_U = (np.flatnonzero(np.diff(of, prepend=-1)) for of in (chunks.of_T, chunks.of_U))
        is_one_C = (np.bincount(chunks.of_T) == 1) & (np.bincount(chunks.of_U) == 1)
        is_one_C &= (both.student_V[ids_T[first_T]] == ids_U[first_U]) & allowed_T[first_T]
        size = len(both.student_V)
        begun_V = np.bincount(ids_T[first_T][allowed_T[first_T]], minlength=size)
        agreed_V = np.bincount(ids_T[first_T][is_one_C], minlength=size)
        is_seen_V = (begun_V > 0) & (agreed_V >= share * begun_V)
        place_U = np.full(len(ids_U), -1, np.int64)
        single_C = is_one_C & kept_C
        place_U[first_U[single_C]] = first_T[single_C]
        return cls(place_U, (both.student_V >= 0) & (is_seen_V | ~both.goes_on_V))


def project(
    top: TopTokens, singles: Singles, place_BL: Ints, both: BothTokens, share: float
) -> tuple[ProjectedTargets, float]:
    """Project the targets of a shard; return them, and the sum of their probabilities without the tails.

    Args:
        top: the teacher's top-k tokens.
        singles: the chunks at which targets are projected.
        place_BL: place in the stream of the student's token at each target [B, L]; -1 for none.
        both: the comparison of the two vocabularies.
        share: a token is kept if its probability is at least this share of the sum of its own and that of the longer
            tokens which the student does not have.
    """
    place_T_BL = np.where(place_BL >= 0, singles.place_U[place_BL], -1)
    row_BL = np.where(place_T_BL >= 0, top.row_T[place_T_BL], -1)
    rows_R = row_BL[row_BL >= 0]
    num_R, tail_R = np.zeros(len(rows_R), np.int32), np.zeros(len(rows_R), np.float32)
    ids, logprobs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    mass = 0.0
    for start in range(0, len(rows_R), _ROWS):
        part = slice(start, start + _ROWS)
        ids_RK, logprobs_RK = top.ids_NK[rows_R[part]], top.logprobs_NK[rows_R[part]]
        probs_RK = np.exp(logprobs_RK)
        keep_RK = singles.is_same_V[ids_RK] & (logprobs_RK > _LEAST_LOGPROB)
        keep_RK &= probs_RK >= share * (probs_RK + _longer(ids_RK, probs_RK, both))
        num_R[part] = keep_RK.sum(axis=1)
        kept_R = np.where(keep_RK, probs_RK, 0).sum(axis=1)
        tail_R[part] = top.rest_N[rows_R[part]] + np.where(keep_RK, 0, probs_RK).sum(axis=1)
        ids.append(both.student_V[ids_RK[keep_RK]].astype(np.int32))
        logprobs.append(logprobs_RK[keep_RK])
        mass += float(kept_R.sum(dtype=np.float64))
    num_ids_BL, tail_BL = np.zeros(row_BL.shape, np.int32), np.zeros(row_BL.shape, np.float32)
    num_ids_BL[row_BL >= 0], tail_BL[row_BL >= 0] = num_R, np.where(num_R > 0, tail_R, 0)
    return ProjectedTargets(num_ids_BL, np.concatenate(ids), np.concatenate(logprobs), tail_BL), mass


def _longer(
    ids_RK: npt.NDArray[np.int32], probs_RK: npt.NDArray[np.float32], both: BothTokens
) -> npt.NDArray[np.float32]:
    """Sum up, for each token, the probability of longer tokens that begin with it and that the student lacks [R, K]."""
    found_RK = np.zeros_like(probs_RK)
    lone_RK = np.where(both.student_V[ids_RK] < 0, probs_RK, 0)
    some = np.flatnonzero(lone_RK.any(axis=1))
    order, length_V = both.table.order, both.table.length_V
    ids_SK = ids_RK[some]
    rank_SK, length_SK = order.rank_V[ids_SK], length_V[ids_SK].astype(np.int32)
    # no token begins with a token that spells no text
    stop_SK = np.where(length_SK > 0, order.stop_V[ids_SK], 0)
    # the last axis counts the longer tokens
    extends_SKK = rank_SK[:, None, :] > rank_SK[:, :, None]
    extends_SKK &= rank_SK[:, None, :] < stop_SK[:, :, None]
    extends_SKK &= length_SK[:, None, :] > length_SK[:, :, None]
    found_RK[some] = np.einsum("skj,sj->sk", extends_SKK, lone_RK[some])
    return found_RK
