"""Bytes per token that simple models would take for the same ids and values.

    ids      uniform over all sets of K of V ids; independent samples from ids' frequencies; the same without repeats
    values   the stored numbers by their frequencies, with a distribution of its own for each rank

Frequencies for one half of the sequences are counted in the other half. In `sampled`, the order of ids with equal
counts carries no information, so the bits that would encode it are subtracted.

Legend: N rows, K ids of the widest row, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from capgap.pipeline.store.quantise import Companded, LogUniform
from capgap.schemas.records import SampledTargets, Targets, TopkTargets

_FINE, _COARSE = LogUniform(), Companded()
_LOG_FACTORIAL = np.array([math.lgamma(n + 1) / math.log(2) for n in range(1 << 10)])


def bounds(found: list[Targets], profile: str | None, vocab_size: int) -> dict[str, float | None]:
    """Return the models' bytes per token for these targets; `profile` is that of `topk`, or None for `sampled`."""
    parts = [_of_sampled(t) if isinstance(t, SampledTargets) else _of_topk(t, profile) for t in found]
    ids_NK = _stacked([ids_NK for ids_NK, _, _ in parts])
    orders_N = np.concatenate([orders_N for _, _, orders_N in parts])
    is_odd_N = np.arange(len(ids_NK)) // found[0].label_logprobs_BL.shape[1] % 2 == 1
    sizes_N = (ids_NK >= 0).sum(axis=1)
    uniform_N = [math.lgamma(vocab_size + 1) - math.lgamma(n + 1) - math.lgamma(vocab_size - n + 1) for n in sizes_N]
    unigram, excluding = _unigram(ids_NK, is_odd_N, vocab_size)
    columns = [_stacked(list(of)) for of in zip(*(columns for _, columns, _ in parts), strict=True)]
    order = float(orders_N.mean())
    # the uniform model encodes which K of V ids are kept and, for topk, their order
    listed = float(_LOG_FACTORIAL[sizes_N].mean()) - order if profile else 0.0
    values = None if profile == "lossless" else sum(_order_0(column, is_odd_N) for column in columns)
    return {
        "ids_uniform_bytes": round((float(np.mean(uniform_N)) / math.log(2) + listed) / 8, 2),
        "ids_unigram_bytes": round((unigram - order) / 8, 2),
        "ids_unigram_excluding_bytes": round((excluding - order) / 8, 2),
        "values_order_0_bytes": None if values is None else round(values / 8, 2),
    }


_Part = tuple[np.ndarray, list[np.ndarray], np.ndarray]


def _of_topk(targets: TopkTargets, profile: str | None) -> _Part:
    """Return ids, columns of stored numbers, and bits of the order among equal counts; -1 stands for no entry."""
    logprobs_NK = targets.logprobs_BLK.reshape(-1, targets.ids_BLK.shape[2])
    is_id_NK = np.isfinite(logprobs_NK)
    quantiser: Any = _FINE if profile == "near-lossless" else _COARSE
    codes_NK = quantiser.encode(np.where(is_id_NK, logprobs_NK, -1)).astype(np.int64)
    steps_NK = np.where(is_id_NK, np.diff(codes_NK, axis=1, prepend=0), -1)
    with np.errstate(divide="ignore"):
        tail_N1 = _FINE.encode(np.log(targets.tail_BL)).astype(np.int64).reshape(-1, 1)
    columns = [steps_NK, tail_N1] + ([is_id_NK.sum(axis=1)[:, None]] if profile == "small" else [])
    return np.where(is_id_NK, targets.ids_BLK.reshape(is_id_NK.shape), -1), columns, np.zeros(len(is_id_NK))


def _of_sampled(targets: SampledTargets) -> _Part:
    sizes_N = targets.num_ids_BL.ravel()
    is_id_NK = np.arange(sizes_N.max()) < sizes_N[:, None]
    ids_NK, counts_NK = np.full(is_id_NK.shape, -1, np.int64), np.zeros(is_id_NK.shape, np.int64)
    ids_NK[is_id_NK], counts_NK[is_id_NK] = targets.ids_D, targets.counts_D
    orders_N = np.zeros(len(sizes_N))
    for count in range(1, int(counts_NK.max()) + 1):
        orders_N += _LOG_FACTORIAL[(counts_NK == count).sum(axis=1)]
    # after the first count of 1 all further counts are 1, so only the first one carries information
    first_1_NK = (counts_NK == 1) & (np.cumsum(counts_NK == 1, axis=1) == 1)
    return ids_NK, [np.where((counts_NK > 1) | first_1_NK, counts_NK, -1)], orders_N


def _unigram(ids_NK: np.ndarray, is_odd_N: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Return bits per row for independent samples, and for samples that exclude the ids listed before in the row."""
    plain = excluding = 0.0
    for half in (is_odd_N, ~is_odd_N):
        told = ids_NK[~half]
        counts_V = np.bincount(told[told >= 0], minlength=vocab_size) + 0.5
        p_V = np.append(counts_V / counts_V.sum(), 1.0)  # id -1 (no entry) has probability 1 and costs nothing
        ids = ids_NK[half]
        p_NK = p_V[ids]
        listed_NK = np.where(ids >= 0, p_NK, 0)
        before_NK = np.cumsum(listed_NK, axis=1) - listed_NK
        left_NK = np.where(ids >= 0, np.maximum(1 - before_NK, p_NK), 1)
        plain -= float(np.log2(p_NK).sum())
        excluding -= float(np.log2(p_NK / left_NK).sum())
    return plain / len(ids_NK), excluding / len(ids_NK)


def _order_0(numbers_NK: np.ndarray, is_odd_N: np.ndarray) -> float:
    """Return bits per row, with each column's distribution from the other half, smoothed by that of all columns."""
    bits, size = 0.0, int(numbers_NK.max()) + 1
    for half in (is_odd_N, ~is_odd_N):
        told = numbers_NK[~half]
        pooled = np.bincount(told[told >= 0], minlength=size) + 0.5
        pooled = pooled / pooled.sum()
        for k in range(numbers_NK.shape[1]):
            here = told[:, k][told[:, k] >= 0]
            p = (np.bincount(here, minlength=size) + pooled) / (len(here) + 1)
            found = numbers_NK[half][:, k]
            bits -= float(np.log2(p[found[found >= 0]]).sum())
    return bits / len(numbers_NK)


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Stack the parts, with -1 where a row is shorter than the widest."""
    widest = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, widest - part.shape[1])), constant_values=-1) for part in parts])
