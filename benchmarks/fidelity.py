"""How much a stored distribution lost: KL to the original, and the error of the student's gradient.

Legend: B sequences, L targets per sequence, K ids kept, N rows, W = K + 1: the kept ids and the tail.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from capgap.schemas.records import TopkTargets


def fidelity(written: list[TopkTargets], found: list[TopkTargets], student_NK: np.ndarray) -> dict[str, float]:
    """Return means over all rows: KL in nats, the gradient's relative error, and the number of kept ids.

    Args:
        written: Targets that were given to the codec.
        found: Targets that the codec decoded.
        student_NK: A student's logprobs of the ids that were written.
    """
    p_NW, start = np.concatenate([_distribution(targets) for targets in written]), 0
    student_NW = _with_rest(np.exp(student_NK.astype(np.float64)))
    kls, apart, sizes = [], [], []
    for targets in found:
        q_NW = _distribution(targets)
        rows = slice(start, start + len(q_NW))
        kept_NW = q_NW > 0
        kept_NW[:, -1] = True
        kls.append(_kl(_coarse(p_NW[rows], kept_NW), q_NW))
        # ids that were dropped share the tail in the student's own proportions, as in the student's loss
        share_NW = np.where(kept_NW, 0, student_NW[rows])
        share_NW[:, -1] = student_NW[rows, -1]
        spread_NW = np.where(kept_NW, q_NW, 0)
        spread_NW[:, -1] = 0
        spread_NW += q_NW[:, -1:] * share_NW / share_NW.sum(axis=1, keepdims=True)
        apart.append(np.linalg.norm(spread_NW - p_NW[rows], axis=1))
        sizes.append(np.linalg.norm(student_NW[rows] - p_NW[rows], axis=1))
        start += len(q_NW)
    return {
        "kl_nats": float(np.concatenate(kls).mean()),
        "gradient_error": float(np.concatenate(apart).mean() / np.concatenate(sizes).mean()),
        "kept_ids": float(np.mean([np.isfinite(targets.logprobs_BLK).sum(axis=2).mean() for targets in found])),
    }


def _distribution(targets: TopkTargets) -> np.ndarray:
    """Return the probabilities of the kept ids and the tail, normalised to sum to 1 [N, W]."""
    kept_NK = np.exp(targets.logprobs_BLK.astype(np.float64)).reshape(-1, targets.ids_BLK.shape[2])
    p_NW = np.concatenate([kept_NK, targets.tail_BL.reshape(-1, 1)], axis=1)
    return p_NW / p_NW.sum(axis=1, keepdims=True)


def _with_rest(kept_NK: np.ndarray) -> np.ndarray:
    rest_N1 = np.maximum(1 - kept_NK.sum(axis=1, keepdims=True), 1e-12)
    return np.concatenate([kept_NK, rest_N1], axis=1)


def _coarse(p_NW: np.ndarray, kept_NW: np.ndarray) -> np.ndarray:
    """Add the probability of the ids that were dropped to the tail."""
    coarse_NW = np.where(kept_NW, p_NW, 0)
    coarse_NW[:, -1] += np.where(kept_NW, 0, p_NW).sum(axis=1)
    return coarse_NW


def _kl(p_NW: np.ndarray, q_NW: np.ndarray) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_NW = np.where(p_NW > 0, p_NW * np.log(p_NW / q_NW), 0)
    return terms_NW.sum(axis=1)
