"""Time and memory of the student's loss, forward and backward, compared with other implementations and cross-entropy.

python benchmarks/sparse_kl.py                                    CPU shapes, float32
python benchmarks/sparse_kl.py --device cuda                      GPU shapes, bfloat16
python benchmarks/sparse_kl.py --shape N,H,V,K --results FOLDER   one shape, figures written to another folder

All ways run in one process, in turn, round after round. On a CPU, time is the CPU time of all threads, which other
processes on the machine disturb least; on a GPU, it is the time between events. Figures are medians, and ratios are
medians of the ratios within a round. Memory is the peak that torch allocates during forward and backward, above what
was allocated before. Other programs' losses are compared at one K for each head, as their cost does not depend on K.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from pathlib import Path

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import RESULTS, caught, keep
from memory import peak_mb
from sparse_kl_peers import peers
from sparse_kl_ways import BASELINE, HALF_MASKED, MIXED, PRODUCTS, Problem, Way, ways

Shape = tuple[int, int, int, int]
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(1024, 96, 4096, 20), (2048, 192, 4096, 20), (2048, 192, 4096, 64), (1024, 512, 32000, 20)],
    "cuda": [(8192, h, v, k) for h in (2048, 4096) for v in (32000, 128256, 151936) for k in (16, 64, 128)],
}
KEPT_BESIDE_PEERS = 64  # the K at which a GPU also measures the peers: eighteen shapes of all would take too long

PRODUCTS_GOALS = {2048: 1.15, 4096: 1.08}  # by hidden size: the loss's time over the time of the three bare products
HALF_MASKED_GOAL = 0.6  # time with half the rows masked over the time of all rows
PEAK_GOAL = 1.02  # peak memory over the formula's


def main() -> None:
    """Measure every shape, print one line per way, and write the figures to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, help="default: 9 on a CPU, 5 on a GPU")
    parser.add_argument("--workspace-mb", type=int, help="memory of a chunk of logits; default: chosen by the loss")
    parser.add_argument("--shape", type=_shape, help="N,H,V,K: rows, hidden, vocabulary, kept ids; default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    flags = parser.parse_args()
    on_gpu = flags.device == "cuda"
    repeats = flags.repeats or (5 if on_gpu else 9)
    figures: list[dict[str, object]] = []
    failed: list[str] = []
    for shape in [flags.shape] if flags.shape else SHAPES[flags.device]:
        with_peers = not on_gpu or flags.shape is not None or shape[-1] == KEPT_BESIDE_PEERS
        with caught(str(shape), failed):
            figures.append(measure(Problem(*shape, flags.device, flags.workspace_mb), repeats, with_peers))
            path = keep("sparse-kl", flags.device, figures, flags.results)  # written after each shape
    if figures:
        print(f"kept in {path}")
    if failed or not figures:
        sys.exit(f"not measured: {'; '.join(failed)}")


def measure(problem: Problem, repeats: int, with_peers: bool) -> dict[str, object]:
    """Return every way's median milliseconds and peak MiB, its ratios to the baseline and to the bare products, and
    whether the goals were met. A missing way has None instead of figures, and a failed one its error."""
    every: dict[str, Way | None] = {**ways(problem), **(peers(problem) if with_peers else {})}
    failed: list[str] = []
    peaks = {}
    for name, way in every.items():
        if way is not None:
            with caught(name, failed):
                peaks[name] = peak_mb(way, problem.device)
    available = {name: way for name, way in every.items() if way is not None and name in peaks}
    times = _interleaved(available, problem.device, repeats)

    def ratio(name: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[name], times[other], strict=True)), 3)

    print(f"N={problem.num_rows} H={problem.hidden} V={problem.vocab} K={problem.top_k}")
    figures: dict[str, object] = {}
    for name in every:
        if name not in available:
            figures[name] = next((one for one in failed if one.startswith(f"{name}: ")), None)
            print(f"  {name:50} missing")
            continue
        figures[name] = {
            "ms": round(statistics.median(times[name]), 3),
            "time_ratio": ratio(name, BASELINE),
            "time_over_products": ratio(name, PRODUCTS),
            "peak_mb": round(peaks[name], 1),
            "peak_ratio": round(peaks[name] / peaks[BASELINE], 3),
        }
        print(f"  {name:50} {figures[name]}")
    goals = [_goal("half the rows masked, time over all rows", ratio(HALF_MASKED, MIXED), HALF_MASKED_GOAL)]
    goals.append(_goal("peak memory over the formula", round(peaks[MIXED] / problem.formula_mb, 3), PEAK_GOAL))
    if problem.device == "cuda" and problem.hidden in PRODUCTS_GOALS:
        goals.append(_goal("time over three bare products", ratio(MIXED, PRODUCTS), PRODUCTS_GOALS[problem.hidden]))
    return problem.shape() | {
        "formula_mb": round(problem.formula_mb, 1),
        "baseline": BASELINE,
        "repeats": repeats,
        "goals": goals,
        "ways": figures,
    }


def _goal(what: str, found: float, at_most: float) -> dict[str, object]:
    print(f"  goal: {what}: {found}, at most {at_most}: {'met' if found <= at_most else 'MISSED'}")
    return {"what": what, "found": found, "at_most": at_most, "met": found <= at_most}


def _shape(text: str) -> Shape:
    num_rows, hidden, vocab, top_k = (int(number) for number in text.split(","))
    return num_rows, hidden, vocab, top_k


def _interleaved(available: dict[str, Way], device: str, repeats: int) -> dict[str, list[float]]:
    """Return the milliseconds of each way in each round. Each round has another order of the ways, because memory that
    one leaves behind helps or hinders the next."""
    times: dict[str, list[float]] = {name: [] for name in available}
    for repeat in range(repeats + 1):
        for name in random.Random(repeat).sample(list(available), len(available)):
            gc.collect()
            taken = _milliseconds(available[name], device)
            if repeat:  # the first round warms up
                times[name].append(taken)
    return times


def _milliseconds(way: Way, device: str) -> float:
    if device == "cpu":
        started = time.process_time()
        way()
        return 1e3 * (time.process_time() - started)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    way()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


if __name__ == "__main__":
    main()
