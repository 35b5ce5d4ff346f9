"""Captures as they are read: each row has tokens, and the teacher's distribution after each of them.

Legend: M tokens of a row, T targets of a row, W ids of its widest target, D positions in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.records import BoolArray, FloatArray, IntArray

# Logprobs that were rounded to 16 bits before they were written may sum to slightly more than 1.
MOST_OVER_ONE = 0.01
# The same limit for rows with approximated logprobs.
MOST_OVER_ONE_APPROXIMATED = 0.1
# A label's logprob may differ by this from that of the same id among the kept ones: the coarsest profile's rounding.
LABEL_TOLERANCE_NATS = 0.11
# The coarse profiles have one code for all logprobs below this.
_FLOOR_NATS = -23.9
_ROUNDING = 1e-4


@dataclass(frozen=True)
class RowTargets:
    """The teacher's distributions after each of a row's first T tokens.

    Attributes:
        ids_TW: Ids by falling logprob, int32; -1 after the last id of a target.
        logprobs_TW: Logprobs of the ids, in nats, float32; -inf after the last id of a target.
        tail_T: Probability of all other ids.
        label_logprobs_T: Logprob of the row's next token, in nats; NaN where it is unknown, or no token follows.
    """

    ids_TW: IntArray
    logprobs_TW: FloatArray
    tail_T: FloatArray
    label_logprobs_T: FloatArray

    def __len__(self) -> int:
        return len(self.tail_T)

    @property
    def widths_T(self) -> npt.NDArray[np.int64]:  # noqa: N802  # named as the fields are
        """Number of ids of each target."""
        widths_T: npt.NDArray[np.int64] = (self.ids_TW >= 0).sum(axis=1)
        return widths_T


@dataclass(frozen=True)
class CapturedRow:
    """One row of a capture, without its padding.

    Attributes:
        where: File and row, for errors.
        tokens_M: Token ids, int32.
        starts_M: True where a token begins a document.
        mask_M: True where a token counts as a label.
        targets: Targets of the row; None where only the tokens are read.
    """

    where: str
    tokens_M: IntArray
    starts_M: BoolArray
    mask_M: BoolArray
    targets: RowTargets | None = None

    def __len__(self) -> int:
        return len(self.tokens_M)

    @property
    def counts_T(self) -> BoolArray:  # noqa: N802  # named as the fields are
        """Whether the next token after each target counts as a label [T]."""
        assert self.targets is not None
        counts_T = np.zeros(len(self.targets), np.bool_)
        num = min(len(self.targets), len(self) - 1)
        counts_T[:num] = self.mask_M[1 : num + 1]
        return counts_T


def begins_with(tokens_M: IntArray, places_D: npt.NDArray[np.int64], ids: tuple[int, ...]) -> BoolArray:
    """Return at which of these positions of a row the ids begin [D]."""
    found_D = np.full(len(places_D), bool(ids))
    for number, one in enumerate(ids):
        at_D = places_D + number
        found_D &= (at_D < len(tokens_M)) & (tokens_M[np.minimum(at_D, len(tokens_M) - 1)] == one)
    return found_D


def checked_targets(
    tokens_M: IntArray,
    ids_TW: IntArray,
    logprobs_TW: FloatArray,
    tail_T: FloatArray | None,
    label_logprobs_T: FloatArray | None,
    vocab_size: int,
    where: str,
    most_over_one: float = MOST_OVER_ONE,
) -> RowTargets:
    """Return the targets of a row after checks, with ids sorted by logprob, and tails and label logprobs filled in.

    Args:
        tokens_M: Tokens of the row.
        ids_TW: Ids in any order; -1 after the last id of a target.
        logprobs_TW: Logprobs of the ids, in nats.
        tail_T: Probability of all other ids; None to use what is left of 1.
        label_logprobs_T: Logprobs of the next tokens, in nats; None to look them up among the ids.
        vocab_size: Size of the vocabulary; every id must be smaller.
        where: File and row, for errors.
        most_over_one: Largest amount by which the sum of a target's probabilities may exceed 1.

    Raises:
        InputError: An id is outside the vocabulary or twice in a target, a value is no logprob, or the probabilities
            do not sum to 1 with the tail, or sum to more than 1 without one.
        MismatchError: A label's logprob differs from that of the same id among the kept ones.
    """
    is_id_TW = ids_TW >= 0
    _require_ids(ids_TW, is_id_TW, vocab_size, where)
    bad_TW = is_id_TW & ~(logprobs_TW <= most_over_one) | is_id_TW & np.isneginf(logprobs_TW)
    if bad_TW.any():
        target, place = np.argwhere(bad_TW)[0]
        raise InputError(
            "not a logprob",
            where=f"{where}, target {target}",
            found=f"{logprobs_TW[target, place]:g}",
            expected="a finite number of nats, at most 0",
            fix="store logprobs, not logits or probabilities",
        )
    logprobs_TW = np.where(is_id_TW, np.minimum(logprobs_TW, 0), -np.inf).astype(np.float32)
    if (logprobs_TW[:, 1:] > logprobs_TW[:, :-1]).any():
        order_TW = np.argsort(-logprobs_TW, axis=1, kind="stable")
        logprobs_TW = np.take_along_axis(logprobs_TW, order_TW, axis=1)
        ids_TW = np.take_along_axis(ids_TW, order_TW, axis=1)
    sums_T = np.exp(logprobs_TW.astype(np.float64)).sum(axis=1)
    tail_T = _tail(sums_T, tail_T, where, most_over_one)
    found_T = _among(ids_TW, logprobs_TW, tokens_M)
    if label_logprobs_T is not None:
        found_T = _agreed(found_T, label_logprobs_T, logprobs_TW, where)
    return RowTargets(ids_TW, logprobs_TW, tail_T, found_T)


def _require_ids(ids_TW: IntArray, is_id_TW: npt.NDArray[np.bool_], vocab_size: int, where: str) -> None:
    if ids_TW.max(initial=0) >= vocab_size:
        target, place = np.argwhere(ids_TW >= vocab_size)[0]
        raise InputError(
            "an id outside the vocabulary",
            where=f"{where}, target {target}",
            found=int(ids_TW[target, place]),
            expected=f"0 to {vocab_size - 1}, the tokenizer's",
            fix="name the tokenizer of the teacher that made the captures",
        )
    sorted_TW = np.sort(ids_TW, axis=1)
    twice_T = ((sorted_TW[:, 1:] == sorted_TW[:, :-1]) & (sorted_TW[:, 1:] >= 0)).any(axis=1)
    if twice_T.any():
        raise InputError("an id twice in a target", where=f"{where}, target {int(np.flatnonzero(twice_T)[0])}")


def _tail(sums_T: npt.NDArray[np.float64], tail_T: FloatArray | None, where: str, most_over_one: float) -> FloatArray:
    if tail_T is None:
        too_much_T = sums_T > 1 + most_over_one
        expected = f"at most 1 + {most_over_one:g}"
        tail_T = np.maximum(1 - sums_T, 0).astype(np.float32)
    else:
        # a coarse profile may have changed each kept logprob by up to a tenth of a nat
        too_much_T = ~(np.abs(sums_T + tail_T - 1) <= MOST_OVER_ONE_APPROXIMATED + _ROUNDING) | (tail_T < 0)
        expected = f"1 with the tail, up to {MOST_OVER_ONE_APPROXIMATED:g}"
    if too_much_T.any():
        target = int(np.flatnonzero(too_much_T)[0])
        raise InputError(
            "probabilities that do not form one distribution",
            where=f"{where}, target {target}",
            found=f"a sum of {sums_T[target]:.4f}, tail {tail_T[target]:.4f}, in {int(too_much_T.sum())} targets",
            expected=expected,
            fix="store normalised logprobs in nats, or set --temperature to the one that they were computed at",
        )
    return tail_T.astype(np.float32)


def _among(ids_TW: IntArray, logprobs_TW: FloatArray, tokens_M: IntArray) -> FloatArray:
    """Return the logprob of each next token among its target's ids; NaN where it is not there, or no token follows."""
    found_T = np.full(len(ids_TW), np.nan, np.float32)
    num = min(len(ids_TW), len(tokens_M) - 1)
    row, place = np.nonzero(ids_TW[:num] == tokens_M[1 : num + 1, None])
    found_T[row] = logprobs_TW[row, place]
    return found_T


def _agreed(found_T: FloatArray, given_T: FloatArray, logprobs_TW: FloatArray, where: str) -> FloatArray:
    """Return the logprobs found among the ids, or else the given ones; raise MismatchError where the two disagree."""
    num = min(len(found_T), len(given_T))
    given_T = np.concatenate([given_T[:num], np.full(len(found_T) - num, np.nan, np.float32)])
    is_found_T = ~np.isnan(found_T)
    last_T = np.where(np.isneginf(logprobs_TW), np.float32(0), logprobs_TW).min(axis=1, initial=0)
    above_T = given_T - np.where(is_found_T, found_T, last_T)
    apart_T = np.abs(np.maximum(given_T, _FLOOR_NATS) - np.maximum(found_T, _FLOOR_NATS)) > LABEL_TOLERANCE_NATS
    wrong_T = np.where(is_found_T, apart_T, above_T > LABEL_TOLERANCE_NATS)
    if wrong_T.any():
        target = int(np.flatnonzero(wrong_T)[0])
        raise MismatchError(
            "the logprob of the next token is not that of the same id in its target",
            where=f"{where}, target {target}",
            found=f"{given_T[target]:.4f}, in {int(wrong_T.sum())} of {len(wrong_T)} targets",
            expected=f"{(found_T if is_found_T[target] else last_T)[target]:.4f}"
            f"{'' if is_found_T[target] else ' or less'}",
            fix="check which token each target predicts, and --offset",
        )
    merged: FloatArray = np.where(is_found_T, found_T, np.minimum(given_T, last_T)).astype(np.float32)
    return merged
