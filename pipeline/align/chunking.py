"""Chunks: the smallest spans on whose byte borders two tokenizations agree, and how far a border can be trusted.

    teacher   | Hel | lo | wor | ld |          chunk 0: Hel lo / Hello     chunk 1: wor ld / w orld
    student   | Hello    | w | orld |

A tokenization also says what does not come next: after the token `wor` the text cannot go on with `d` where `word` is a
token, for then that would stand here. So the teacher's probability of a chunk leaves out the texts that a longer last
token begins with, and the student's leaves out others. The border behind a chunk counts as reliable where the teacher's
probability of its last token is nearly all that it gives to that token and to longer ones that the student would not
leave out as well. (Approximate likelihood matching thresholds this bias: arXiv 2503.20083.)

Legend: T teacher's tokens, U student's tokens, S bytes, C chunks, N targets, K ids kept of a target, D ids of all.
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
    """Two tokenizations of one text, cut where they agree.

    Attributes:
        of_T: the chunk of each of the teacher's tokens, rising.
        of_U: the chunk of each of the student's.
        count: chunks.
    """

    of_T: Ints
    of_U: Ints
    count: int


def cut(ends_T: Ints, ends_U: Ints) -> Chunks:
    """The chunks of a text that is not empty.

    A token without bytes, as the blank that some tokenizers put before a document, belongs to the chunk of the token
    behind it, and not to the end of the document before.

    Args:
        ends_T: the byte behind each of the teacher's tokens, never falling; the last one is the text's end.
        ends_U: likewise of the student's.
    """
    assert len(ends_T) and len(ends_U) and ends_T[-1] == ends_U[-1], "both spell the same text"
    seen_S = np.zeros(int(ends_T[-1]) + 1, np.uint8)
    seen_S[ends_T] |= 1
    seen_S[ends_U] |= 2
    is_common_S = seen_S == 3
    # a token without bytes at the very beginning ends no chunk
    is_common_S[0] = False
    # common borders before each byte
    before_S = np.cumsum(is_common_S) - is_common_S
    return Chunks(before_S[_last_bytes(ends_T)], before_S[_last_bytes(ends_U)], int(is_common_S.sum()))


def _last_bytes(ends_T: Ints) -> Ints:
    """Where a byte of each token ends: of one without bytes the next one's, but at the text's end."""
    found_T: Ints = np.minimum(ends_T + (np.diff(ends_T, prepend=0) == 0), ends_T[-1])
    return found_T


@dataclass(frozen=True)
class Longer:
    """What the teacher gave to tokens that begin with a target's own and are longer.

    Attributes:
        all_N: their probability, as far as they were kept, or the share of samples.
        other_N: of those of them that the student's vocabulary does not have.
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
    """The probability of longer tokens at each target.

    Args:
        targets: of a block.
        labels_N: the token that follows at each.
        num_samples: of a `sampled` target.
        table: the bytes of the teacher's tokens.
        is_shared_V: which of them the student has as well.
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
    """Where, row after row, a token begins with its row's label and has more bytes [D].

    An end of a document is no beginning of anything.
    """
    rank_V, length_V = table.order.rank_V, table.length_V
    first_N = rank_V[labels_N]
    stop_N = np.where(length_V[labels_N] > 0, table.order.stop_V[labels_N], 0)
    ranks_NK = rank_V[ids_NK]
    # the places of an array of one axis are found far quicker than those of two
    place_D = np.flatnonzero((ranks_NK > first_N[:, None]) & (ranks_NK < stop_N[:, None]))
    # two ids may have the same bytes
    label_D = labels_N[place_D // ids_NK.shape[1]]
    found_D: Ints = place_D[length_V[ids_NK.ravel()[place_D]] > length_V[label_D]]
    return found_D


def border_probabilities(
    chunks: Chunks, ends_T: Ints, lengths_T: Ints, ends_U: Ints, lengths_U: Ints, logprobs_T: Doubles, longer: Longer
) -> Doubles:
    """How far the border behind each chunk can be trusted [C]: the share of its last token beside longer ones.

    Where both end the chunk with the same bytes, longer tokens that both vocabularies have are left out by both, and
    count for neither. NaN where the last token's logprob is not known.
    """
    last_T = np.flatnonzero(np.diff(chunks.of_T, append=chunks.count))
    last_U = np.flatnonzero(np.diff(chunks.of_U, append=chunks.count))
    is_same_C = (ends_T[last_T] - lengths_T[last_T]) == (ends_U[last_U] - lengths_U[last_U])
    longer_C = np.where(is_same_C, longer.other_N[last_T], longer.all_N[last_T])
    own_C = np.exp(logprobs_T[last_T])
    with np.errstate(invalid="ignore", divide="ignore"):
        found_C: Doubles = np.where(longer_C > 0, own_C / (own_C + longer_C), np.where(np.isnan(own_C), np.nan, 1.0))
    return found_C
