"""Measure the same rows with DistillKit's own code, from a checkout of github.com/arcee-ai/DistillKit.

DistillKit stores no tail. Here, 1 minus the sum of its probabilities is taken as the tail. A second KL reads its rows
as its losses do by default, as distributions over the kept ids alone.

Legend: N rows, K ids kept.
"""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from fidelity import fidelity

from capgap.schemas.records import TopkTargets

_POLYNOMIAL = [0, 1, 2, 3, 4, "sqrt"]
CONFIGS: dict[str, dict[str, Any]] = {
    "k=64, 16 exact, polynomial": {"k": 64, "exact_k": 16, "polynomial_terms": _POLYNOMIAL},
    "k=64, 16 exact, polynomial, normalize_t": {
        "k": 64,
        "exact_k": 16,
        "polynomial_terms": _POLYNOMIAL,
        "normalize_t": True,
    },
    "k=64, bfloat16": {"k": 64, "exact_k": 64, "polynomial_terms": None},
    "k=50, 1 exact, polynomial": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
_SMALLEST_TAIL = 1e-6


class DistillKit:
    """DistillKit's code, imported from a checkout.

    Attributes:
        commit: Short commit hash of the checkout.
    """

    def __init__(self, folder: Path) -> None:
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        sys.path.insert(0, str(folder))
        self._compression = importlib.import_module("distillkit.compression")

    def measure(
        self, targets: list[TopkTargets], student_NK: np.ndarray, vocab_size: int
    ) -> tuple[list[dict[str, Any]], dict[str, Callable[[], object]]]:
        """Return one entry per configuration, with bytes and losses, and the calls to time, named by their work."""
        entries, ways = [], {}
        for name, settings in CONFIGS.items():
            label = f"DistillKit {self.commit} {name}"
            config = self._compression.DistributionQuantizationConfig(
                d=vocab_size, exact_dtype="bfloat16", residual_bins=[], delta_encoding=False, **settings
            )
            compressor = self._compression.LogprobCompressor(config)
            # one sequence at a time, because more rows would not fit into the processor's cache
            kept = [_first(part, config.k) for t in targets for part in _sequences(t)]
            given = [(torch.from_numpy(t.ids_BLK.astype(np.int64)), torch.from_numpy(t.logprobs_BLK)) for t in kept]
            packed = [compressor.compress_from_sparse(*one) for one in given]
            num_rows = sum(t.tail_BL.size for t in targets)
            read = [_as_targets(*compressor.decompress_to_sparse(one), t) for one, t in zip(packed, kept, strict=True)]
            entries.append(
                {
                    "codec": label,
                    "bytes_per_token": sum(v.numel() * v.itemsize for one in packed for v in one.values()) / num_rows,
                    **fidelity(kept, read, student_NK[:, : config.k]),
                    "kl_renormalised_nats": _renormalised(kept, read),
                }
            )
            ways[f"encode {label}"] = lambda c=compressor, g=given: [c.compress_from_sparse(*one) for one in g]
            ways[f"decode {label}"] = lambda c=compressor, p=packed: [c.decompress_to_sparse(one) for one in p]
        return entries, ways


def _sequences(targets: TopkTargets) -> list[TopkTargets]:
    return [TopkTargets(*(array[i : i + 1] for array in vars(targets).values())) for i in range(len(targets.tail_BL))]


def _first(targets: TopkTargets, top_k: int) -> TopkTargets:
    """Keep the `top_k` most probable ids, and add the probability of the others to the tail."""
    rest_BL = np.exp(targets.logprobs_BLK[:, :, top_k:]).sum(axis=2)
    return TopkTargets(
        targets.ids_BLK[:, :, :top_k],
        targets.logprobs_BLK[:, :, :top_k],
        targets.tail_BL + rest_BL,
        targets.label_logprobs_BL,
        targets.log_tails_BLT,
    )


def _as_targets(ids: torch.Tensor, logprobs: torch.Tensor, written: TopkTargets) -> TopkTargets:
    """Return the decoded rows as targets, in the order of the ids that were written; DistillKit may reorder ids."""
    order = torch.argsort(ids, dim=-1)
    place = np.argsort(np.argsort(written.ids_BLK, axis=2), axis=2)
    same = np.take_along_axis(ids.gather(-1, order).numpy(), place, axis=2)
    assert (same == written.ids_BLK).all(), "other ids were read than written"
    logprobs_BLK = np.take_along_axis(logprobs.float().gather(-1, order).numpy(), place, axis=2)
    tail_BL = np.maximum(1 - np.exp(logprobs_BLK.astype(np.float64)).sum(axis=2), _SMALLEST_TAIL)
    return dataclasses.replace(written, logprobs_BLK=logprobs_BLK, tail_BL=tail_BL.astype(np.float32))


def _renormalised(written: list[TopkTargets], read: list[TopkTargets]) -> float:
    """Return the mean KL, in nats, between the distributions over the kept ids alone."""
    p_NK, q_NK = (
        np.concatenate([np.exp(t.logprobs_BLK.astype(np.float64)).reshape(-1, t.ids_BLK.shape[2]) for t in of])
        for of in (written, read)
    )
    p_NK, q_NK = (of / of.sum(axis=1, keepdims=True) for of in (p_NK, q_NK))
    return float(np.where(p_NK > 0, p_NK * np.log(p_NK / q_NK), 0).sum(axis=1).mean())
