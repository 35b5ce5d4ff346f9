"""Compare storing probable tokens exactly and sampling the others with more systematic samples at the same bytes.

python benchmarks/threshold_rows.py --cache runs/quality-smol/cache-50/cache     needs a cache with both recordings

The variances are calculated from the probabilities p of each row's top-k tokens. With n systematic samples, a token's
weight is the floor or the ceiling of n p, divided by n; sampling with a threshold keeps p itself where p is at least
1 / n. Both keep sum min(1, n p) distinct tokens. The variance is that of the weights, summed over a row's tokens, which
is that of the gradient at the student's logits. Rows in which a token outside the top k could reach 1 / n are left out.

Legend: N rows, K top-k tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from machine import RESULTS, keep
from stored_parts import parts_of

from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store import ShardReader
from capgap.schemas.records import SampledTargets, TopkTargets

_STEP = 1 / 64  # nats; the step of logprobs in the profile `near-lossless`
_NUM_SAMPLES = (12, 25, 50)


def main() -> None:
    """Calculate, print the figures, and write them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("runs/quality-smol/cache-50/cache"), help="a stage's folder")
    parser.add_argument("--name", default="smol", help="name of the cache in the results")
    parser.add_argument("--members", type=int, default=4, help="members that are read of each recording")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    flags = parser.parse_args()
    manifest = read_manifest(flags.cache)
    assert manifest is not None, f"{flags.cache} is no finished stage"
    sampled, topk = (ShardReader(flags.cache, manifest.shard_sets[name]) for name in ("sampled", "topk"))
    rows = [_probabilities(topk, place) for place in _places(topk)[: flags.members]]
    p_NK, tail_N = (np.concatenate(part) for part in zip(*rows, strict=True))
    figures = {"num_rows": len(p_NK), "id_bytes": round(_id_bytes(sampled, flags.members), 3)}
    found = [at(p_NK, tail_N, n, figures["id_bytes"]) for n in _NUM_SAMPLES]
    for row in found:
        print(row)
    print(keep(f"threshold-rows-{flags.name}", "cpu", figures | {"rows": found}, flags.results))


def at(p_NK: np.ndarray, tail_N: np.ndarray, num_samples: int, id_bytes: float) -> dict[str, Any]:
    """Return the figures of both ways at a number of samples, and how many systematic samples take as many bytes."""
    systematic, ids, count_bytes = systematic_at(p_NK, tail_N, num_samples)
    fits_N = p_NK[:, -1] < 1 / num_samples
    p_NK, tail_N = p_NK[fits_N], tail_N[fits_N]
    is_exact_NK = p_NK >= 1 / num_samples
    apart_NK = np.where(is_exact_NK, 0, p_NK * (1 / num_samples - p_NK))
    threshold = float((apart_NK.sum(1) + tail_N / num_samples).mean())
    codes_NK = np.where(is_exact_NK, np.round(-np.log(np.maximum(p_NK, 1e-30)) / _STEP), 0).astype(np.int64)
    steps_NK = np.diff(codes_NK, axis=1, prepend=0)
    exact_bytes = sum(_entropy_bits(steps_NK[is_exact_NK[:, k], k]) for k in range(p_NK.shape[1])) / len(p_NK) / 8
    extra = exact_bytes - count_bytes
    # add systematic samples until they take as many bytes as the exact probabilities
    more = num_samples
    while True:
        variance, wider, wider_count_bytes = systematic_at(p_NK, tail_N, more)
        if (wider - ids) * id_bytes + wider_count_bytes - count_bytes >= extra or more > 4 * num_samples:
            break
        more += 1
    return {
        "num_samples": num_samples,
        "rows_that_fit": round(float(fits_N.mean()), 4),
        "ids_per_token": round(ids, 2),
        "exact_ids_per_token": round(float(is_exact_NK.sum(1).mean()), 2),
        "variance": round(systematic, 6),
        "threshold_variance_share": round(threshold / systematic, 4),
        "count_bytes": round(count_bytes, 2),
        "exact_bytes": round(exact_bytes, 2),
        "systematic_samples_at_equal_bytes": more,
        "their_variance_share": round(variance / systematic, 4),
    }


def systematic_at(p_NK: np.ndarray, tail_N: np.ndarray, num_samples: int) -> tuple[float, float, float]:
    """Return the variance, the number of distinct tokens and the bytes of the counts, as means over the rows that fit.

    All tokens of the tail are taken to be improbable, so that the variance of the tail is its probability over n.
    """
    fits_N = p_NK[:, -1] < 1 / num_samples
    p_NK, tail_N = p_NK[fits_N], tail_N[fits_N]
    part_NK = np.modf(num_samples * p_NK)[0]
    variance = (part_NK * (1 - part_NK)).sum(1) / num_samples**2 + tail_N / num_samples
    ids = np.minimum(1, num_samples * p_NK).sum(1) + num_samples * tail_N
    # counts of the tokens that are certainly sampled, with a distribution of its own for each rank
    counts_NK = np.round(num_samples * p_NK).astype(np.int64)
    is_sure_NK = p_NK >= 1 / num_samples
    bits = sum(_entropy_bits(counts_NK[is_sure_NK[:, k], k]) for k in range(p_NK.shape[1]))
    return float(variance.mean()), float(ids.mean()), bits / len(p_NK) / 8


def _entropy_bits(numbers: np.ndarray) -> float:
    """Return the bits of all numbers together, coded by their own distribution."""
    if not len(numbers):
        return 0.0
    counts = np.unique(numbers, return_counts=True)[1]
    return float(-(counts * np.log2(counts / len(numbers))).sum())


def _places(reader: ShardReader) -> list[tuple[int, int]]:
    shards = enumerate(reader.shard_set.shards)
    return [(shard, member) for shard, entry in shards for member in range(len(entry.members.offset))]


def _probabilities(reader: ShardReader, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    _, targets = reader.read_member(*place)
    assert isinstance(targets, TopkTargets)
    p_NK = np.exp(targets.logprobs_BLK.astype(np.float64)).reshape(-1, targets.ids_BLK.shape[2])
    return p_NK, np.maximum(1 - p_NK.sum(1), 0)


def _id_bytes(reader: ShardReader, num_members: int) -> float:
    """Return the bytes that a cache of samples takes for the id of one distinct token."""
    num_bytes = num_ids = 0
    for shard, member in _places(reader)[:num_members]:
        entry = reader.shard_set.shards[shard].member(member)
        with reader.place.open(reader.shard_set.shards[shard].file) as file:
            file.seek(entry.offset)
            data = file.read(entry.num_bytes)
        num_bytes += parts_of(data)["ids"]
        _, targets = reader.codec.decode(data, "here")
        assert isinstance(targets, SampledTargets)
        num_ids += len(targets.ids_D)
    return num_bytes / num_ids


if __name__ == "__main__":
    main()
