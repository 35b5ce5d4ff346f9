"""A check that each target predicts the token after it, made from the captures before any of them is written.

A target's logprobs of three tokens are compared: the token after it, the one before that and the one behind it. On text
that a teacher has learnt from, the token that a target predicts has by far the highest mean logprob.

Legend: M tokens of a row, T targets of a row, W ids of its widest target, N compared targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from capgap.pipeline.interchange.captures import CapturedRow, RowTargets
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.records import IntArray

Float64Array = npt.NDArray[np.float64]

# This many targets are enough to tell; no more of a file is held back.
ENOUGH_TARGETS = 2048
# The mean must be this many standard errors above those of the other two positions to prove the alignment.
_STANDARD_ERRORS = 3
_SHIFTS = (-1, 0, 1)
_LEAST_NATS = -30.0


def proven(rows: Iterable[CapturedRow], path: Path, vocab_size: int) -> Iterator[CapturedRow]:
    """Yield the same rows, held back until the first targets of the file have proven to be aligned with their tokens.

    Raises:
        MismatchError: The targets predict another token than the one after them.
        InputError: The targets are too few, or too alike, to tell.
    """
    held: list[CapturedRow] = []
    scores: list[Float64Array] = []
    found = 0
    for row in rows:
        if found >= ENOUGH_TARGETS:
            yield row
            continue
        held.append(row)
        assert row.targets is not None
        scores.append(scores_at_shifts(row.tokens_M, row.targets, vocab_size))
        found += scores[-1].shape[1]
        if found >= ENOUGH_TARGETS:
            require_aligned(np.concatenate(scores, axis=1), path)
            yield from held
            held = []
    if held:
        require_aligned(np.concatenate(scores, axis=1), path)
        yield from held


def scores_at_shifts(tokens_M: IntArray, targets: RowTargets, vocab_size: int) -> Float64Array:
    """Return logprobs [3, N], under each target, of the token before the next one, the next one, and the one behind it.

    The tail is spread evenly over all other ids. Targets whose tail is 1, as in some prompts, are left out.
    """
    num = max(min(len(targets), len(tokens_M) - 2), 0)
    ids_NW, logprobs_NW = targets.ids_TW[:num], targets.logprobs_TW[:num]
    others_N = np.maximum(vocab_size - (ids_NW >= 0).sum(axis=1), 1)
    with np.errstate(divide="ignore"):
        rest_N = np.maximum(np.log(targets.tail_T[:num].astype(np.float64)), _LEAST_NATS) - np.log(others_N)
    scores = np.empty((3, num))
    for place in range(3):
        is_it_NW = ids_NW == tokens_M[place : place + num, None]
        kept_N = np.where(is_it_NW, logprobs_NW, -np.inf).max(axis=1, initial=-np.inf)
        # limited, so that one token which a server calls impossible does not outweigh all others
        scores[place] = np.where(is_it_NW.any(axis=1), np.maximum(kept_N, _LEAST_NATS), rest_N)
    found: Float64Array = scores[:, targets.tail_T[:num] < 1]
    return found


def require_aligned(scores: Float64Array, path: Path) -> None:
    """Raise an error unless the next token's mean logprob is above the others' beyond chance."""
    means = scores.mean(axis=1) if scores.shape[1] else np.zeros(3)
    said = ", ".join(f"{mean:.2f} at {shift:+d}" for mean, shift in zip(means, _SHIFTS, strict=True))
    where = f"{path}, the first {scores.shape[1]} targets"
    best = int(means.argmax())
    if best != 1 and _is_above(scores[best] - scores[1]):
        raise MismatchError(
            "targets are not aligned with their tokens: they predict "
            + ("the token before the next one" if best == 0 else "the token behind the next one"),
            where=where,
            found=f"mean logprobs of {said}",
            expected="the highest at +0",
            fix="set --offset -1, because the first target predicts the first token itself"
            if best == 0
            else "the first target was left out: align the captures anew",
        )
    if not all(_is_above(scores[1] - scores[other]) for other in (0, 2)):
        raise InputError(
            "it cannot be told which token a target predicts",
            where=where,
            found=f"mean logprobs of {said}",
            expected=f"the one at +0 above the others by {_STANDARD_ERRORS} standard errors",
            fix="give more rows, or check that tokens and targets belong together",
        )


def _is_above(differences_N: Float64Array) -> bool:
    if len(differences_N) < 2:
        return False
    error = float(differences_N.std(ddof=1)) / float(np.sqrt(len(differences_N)))
    return float(differences_N.mean()) > _STANDARD_ERRORS * error
