"""Checks that every codec makes of values before it writes them and after it reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from capgap.schemas.errors import InputError

# bound on the rounding error of float32 sums of probabilities, and of their logarithms
ROUNDING = 1e-4


def check_ids(name: str, ids: npt.NDArray[Any], vocab_size: int) -> None:
    """Raise InputError if an id is negative or not below the vocabulary's size."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise InputError(
            f"{name}: an id outside the vocabulary",
            found=f"{ids.min()} to {ids.max()}",
            expected=f"0 to {vocab_size - 1}",
        )


def check_distinct(name: str, ids_NK: npt.NDArray[Any]) -> None:
    """Raise InputError if an id stands twice in a row. Of padding, each entry of a row must be another negative number.

    Readers leave this check out, as docs/format.md says: it would take 5 % of the time of reading a `topk` cache.
    """
    sorted_NK = np.sort(ids_NK, axis=1)  # many short sorts take a tenth of the time of one long sort
    is_twice_NK = sorted_NK[:, 1:] == sorted_NK[:, :-1]
    if is_twice_NK.any():
        row, place = np.argwhere(is_twice_NK)[0]
        raise InputError(
            f"{name}: an id twice in a row", found=f"id {sorted_NK[row, place]} in row {row}", expected="distinct ids"
        )


def check_logprobs(name: str, logprobs: npt.NDArray[np.float32]) -> None:
    """Raise InputError if a logprob is infinite, NaN, or above 0 by more than rounding explains."""
    check_finite(name, logprobs)
    if logprobs.size and logprobs.max() > ROUNDING:
        raise InputError(f"{name}: a logprob above 0", found=round(float(logprobs.max()), 6))


def check_finite(name: str, values: npt.NDArray[np.float32]) -> None:
    """Raise InputError if a value is infinite or NaN."""
    if not np.isfinite(values).all():
        raise InputError(
            f"{name}: a value that is not finite", found=f"{int((~np.isfinite(values)).sum())} of {values.size}"
        )


def check_counts(num_ids_N: npt.NDArray[Any], ids_D: npt.NDArray[Any], counts_D: npt.NDArray[Any], total: int) -> None:
    """Raise InputError unless every row has ids, every id has samples, and each row's counts sum to `total`."""
    if num_ids_N.sum() != len(ids_D) or len(ids_D) != len(counts_D):
        raise InputError("ids, counts and num_ids disagree", found=len(ids_D), expected=num_ids_N.sum())
    if len(num_ids_N) and (num_ids_N.min() < 1 or counts_D.min() < 1):
        raise InputError("a row without ids, or an id without samples")
    first_N = np.cumsum(num_ids_N) - num_ids_N
    sums_N = np.add.reduceat(counts_D, first_N) if len(first_N) else np.zeros(0)
    if (sums_N != total).any():
        row = int(np.flatnonzero(sums_N != total)[0])
        raise InputError(f"counts of row {row} do not sum", found=int(sums_N[row]), expected=total)
