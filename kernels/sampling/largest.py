"""The K largest values of each row, on a CPU several times faster than with `torch.topk`.

    row -> maxima of groups of ids -> threshold: the K-th largest maximum -> the few ids that reach it -> K largest

A row is seen as a matrix whose columns are the groups. At least K ids reach the threshold, one in each of K columns, so
all of the K largest reach it. NumPy's partition and sort are vectorized: at V = 4096 and K = 64, these steps take 6 us
a row and `torch.topk` takes 20 us.

Legend: N rows, V ids, K largest, G columns, C ids that reach the threshold in all rows, M the most of them in one row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_MIN_HEIGHT = 3  # with fewer ids in a column, so many candidates remain that torch.topk is faster
_MAX_SHARE = 8  # with more than 8 K candidates, which equal values can cause, torch.topk is faster


def largest(rows_NV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the `top_k` largest values of each row in falling order, and their indices, int64, both [N, K].

    The result is that of `torch.topk`, except that the order of equal values may differ.

    Args:
        rows_NV: Values [N, V] of any floating dtype.
        top_k: K, at most V.
    """
    height = math.isqrt(rows_NV.shape[1] // top_k)
    if rows_NV.device.type == "cpu" and height >= _MIN_HEIGHT and len(rows_NV):
        found = _among_candidates(rows_NV, top_k, height)
        if found is not None:
            return found
    return torch.topk(rows_NV, top_k, dim=-1)


def _among_candidates(rows_NV: Tensor, top_k: int, height: int) -> tuple[Tensor, Tensor] | None:
    """Return the result of `largest`; None if a row has too many candidates, or too few because of NaN."""
    num_rows, vocab_size = rows_NV.shape
    num_columns = vocab_size // height
    # float32 because NumPy has no bfloat16 and is slow with float16; contiguous so that flat indices are valid
    wide_NV = rows_NV.detach().to(torch.promote_types(rows_NV.dtype, torch.float32)).contiguous()
    maxima_NG = wide_NV[:, : height * num_columns].view(num_rows, height, num_columns).amax(1).numpy()
    thresholds_N1 = np.partition(maxima_NG, num_columns - top_k)[:, num_columns - top_k, None]
    values_NV = wide_NV.numpy()
    places_C = np.flatnonzero(values_NV >= thresholds_N1)
    rows_N = np.arange(num_rows + 1) * vocab_size
    starts_N = np.searchsorted(places_C, rows_N)
    num_candidates_N1 = np.diff(starts_N)[:, None]
    if num_candidates_N1.min() < top_k or num_candidates_N1.max() > _MAX_SHARE * top_k:
        return None
    numbers_M = np.arange(num_candidates_N1.max())
    places_NM = places_C.take(starts_N[:-1, None] + numbers_M, mode="clip")
    values_NM = values_NV.ravel().take(places_NM)
    values_NM[numbers_M >= num_candidates_N1] = -np.inf
    order_NK = np.argsort(values_NM)[:, : -top_k - 1 : -1]
    ids_NK = np.take_along_axis(places_NM, order_NK, 1) - rows_N[:-1, None]
    kept_NK = torch.from_numpy(np.take_along_axis(values_NM, order_NK, 1)).to(rows_NV.dtype)
    return kept_NK, torch.from_numpy(ids_NK)
