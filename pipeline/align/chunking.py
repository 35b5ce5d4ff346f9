"""Cuts text into chunks, the smallest spans on whose byte borders two tokenizations agree, and rates their borders.

    teacher   | Hel | lo | wor | ld |          chunk 0: Hel lo / Hello     chunk 1: wor ld / w orld
    student   | Hello    | w | orld |

A token also says what cannot follow: after the token `wor`, the text cannot continue with `d` if `word` is a token,
because the tokenizer would have chosen `word` instead. So the teacher's probability of a chunk excludes all texts in
which a longer token would take the place of the chunk's last token, and the student's probability excludes other texts.
The border behind a chunk is reliable if the last token holds nearly all of the teacher's probability of this token and
of the longer tokens that only the teacher excludes. (Approximate likelihood matching thresholds this bias: arXiv
2503.20083.)

Legend: T teacher's tokens, U student's tokens, S bytes, C chunks, N targets, K ids per target, D ids of all targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.pipeline.align.token_bytes import Ints, TokenBytes
from capgap.schemas.records import SampledTargets, TopkTargets

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chunks:
    """Two tokenizations of one text, cut into chunks at their common borders.

    Attributes:
        of_T: number of the chunk of each of the teacher's tokens [T], never falling.
        of_U: number of the chunk of each of the student's tokens [U], never falling.
        count: number of chunks.
    """

    of_T: Ints
    of_U: Ints
    count: int


def cut(ends_T: Ints, ends_U: Ints) -> Chunks:
    """Cut two tokenizations of one text, which must not be empty, into chunks.

    A token without bytes, such as the blank that some tokenizers put before a document, belongs to the chunk of the
    token behind it, and not to the end of the document before.

    Args:
        ends_T: offset of the byte behind each of the teacher's tokens, never falling; the last one is the text's end.
        ends_U: the same offsets for the student's tokens.
    """
    assert len(ends_T) and len(ends_U) and ends_T[-1] == ends_U[-1], "both spell the same text"
    seen_S = np.zeros(int(ends_T[-1]) + 1, np.uint8)
    seen_S[ends_T] |= 1
    seen_S[ends_U] |= 2
    is_common_S = seen_S == 3
    # a token without bytes at the very beginning ends no chunk
    is_common_S[0] = False
    # the number of common borders before each byte
    before_S = np.cumsum(is_common_S) - is_common_S
    return Chunks(before_S[_last_bytes(ends_T)], before_S[_last_bytes(ends_U)], int(is_common_S.sum()))


def _last_bytes(ends_T: Ints) -> Ints:
    """Return the offset behind each token's last byte; for one without bytes, behind the next token's first byte."""
    found_T: Ints = np.minimum(ends_T + (np.diff(ends_T, prepend=0) == 0), ends_T[-1])
    return found_T


@dataclass(frozen=True)
class Longer:
    """The teacher's probability of the longer tokens that begin with the token which really follows.

    Attributes:
        all_N: the probability of all such tokens that the cache kept, or their share of the samples [N], float32.
        other_N: the part of it that belongs to tokens which the student's vocabulary does not have [N], float32.
    """

    all_N: npt.NDArray[np.float32]
    other_N: npt.NDArray[np.float32]


def longer_tokens(
    targets: TopkTargets | SampledTargets,
    labels_N: Ints,
    num_samples: int,
    table: TokenBytes,
    is_shared_V: npt.NDArray[np.bool_],
) -> Longer:
    """Sum up, at each target, the probability of the tokens that begin with the real next token and are longer.

    Args:
        targets: the targets of a block.
        labels_N: the real next token at each target.
        num_samples: number of samples per target of a `sampled` recording.
        table: the bytes of the teacher's tokens.
        is_shared_V: which of the teacher's tokens the student's vocabulary has as well.
    """
    if isinstance(targets, TopkTargets):
        num_ids = targets.ids_BLK.shape[2]
        place_D = _longer_places(targets.ids_BLK.reshape(-1, num_ids), labels_N, table)
        row_D, ids_D = place_D // num_ids, targets.ids_BLK.ravel()[place_D]
        weight_D = np.exp(targets.logprobs_BLK.ravel()[place_D].astype(np.float64))
    else:
        row_D = np.repeat(np.arange(len(labels_N)), targets.num_ids_BL.ravel())
        place_D = _longer_places(targets.ids_D[:, None], labels_N[row_D], table)
        row_D, ids_D = row_D[place_D], targets.ids_D[place_D]
        weight_D = targets.counts_D[place_D] / num_samples
    other_D = weight_D * ~is_shared_V[ids_D]
    all_N, other_N = (np.bincount(row_D, weights=one, minlength=len(labels_N)) for one in (weight_D, other_D))
    return Longer(all_N.astype(np.float32), other_N.astype(np.float32))


def _longer_places(ids_NK: npt.NDArray[np.int32], labels_N: Ints, table: TokenBytes) -> Ints:
    """Return the flat places of the tokens that begin with the label of their row and have more bytes [D].

    No token begins with the end of a document, which has no bytes.
    """
    rank_V, length_V = table.order.rank_V, table.length_V
    first_N = rank_V[labels_N]
    stop_N = np.where(length_V[labels_N] > 0, table.order.stop_V[labels_N], 0)
    ranks_NK = rank_V[ids_NK]
    # flat, because numpy finds the places in an array of one axis far more quickly than in one of two
    place_D = np.flatnonzero((ranks_NK > first_N[:, None]) & (ranks_NK < stop_N[:, None]))
    # two ids may have the same bytes, so that a token in this range need not be longer
    label_D = labels_N[place_D // ids_NK.shape[1]]
    found_D: Ints = place_D[length_V[ids_NK.ravel()[place_D]] > length_V[label_D]]
    return found_D


def border_probabilities(
    chunks: Chunks, ends_T: Ints, lengths_T: Ints, ends_U: Ints, lengths_U: Ints, logprobs_T: Doubles, longer: Longer
) -> Doubles:
    """Return how far the border behind each chunk can be trusted [C], from 0 to 1.

    This is the probability of the chunk's last token, divided by that of this token and the longer ones. If both
    tokenizations end the chunk with the same bytes, longer tokens that both vocabularies have are not counted, because
    both exclude the same texts. NaN if the logprob of the last token is not known.

    Args:
        chunks: the chunks of the text.
        ends_T: offset of the byte behind each of the teacher's tokens.
        lengths_T: bytes of each of the teacher's tokens.
        ends_U: offset of the byte behind each of the student's tokens.
        lengths_U: bytes of each of the student's tokens.
        logprobs_T: the teacher's logprob of each of its tokens in nats; NaN where it is not known.
        longer: the teacher's probability of the longer tokens in the place of each token.
    """
    last_T = np.flatnonzero(np.diff(chunks.of_T, append=chunks.count))
    last_U = np.flatnonzero(np.diff(chunks.of_U, append=chunks.count))
    is_same_C = (ends_T[last_T] - lengths_T[last_T]) == (ends_U[last_U] - lengths_U[last_U])
    longer_C = np.where(is_same_C, longer.other_N[last_T], longer.all_N[last_T])
    own_C = np.exp(logprobs_T[last_T])
    with np.errstate(invalid="ignore", divide="ignore"):
        found_C: Doubles = np.where(longer_C > 0, own_C / (own_C + longer_C), np.where(np.isnan(own_C), np.nan, 1.0))
    return found_C
