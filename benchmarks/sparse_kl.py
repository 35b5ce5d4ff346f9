"""Time and memory of the student's loss, forward and backward, beside other ways to the same or plain cross-entropy.

python benchmarks/sparse_kl.py                     CPU shapes, float32
python benchmarks/sparse_kl.py --device cuda       GPU shapes, bfloat16

All ways run in one process, in turn, round after round. Time is CPU time of all threads on a CPU, which neighbours on
the machine disturb least, and time between events on a GPU; figures are medians, ratios medians of the ratios within a
round. Memory is the peak of what torch allocates during forward and backward, over what stood before.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable

import torch
from machine import keep
from sparse_kl_ways import BASELINE, Problem, ways

SHAPES = {
    "cpu": [(1024, 96, 4096, 20), (2048, 192, 4096, 20), (2048, 192, 4096, 64), (1024, 512, 32000, 20)],
    "cuda": [(8192, h, v, k) for h in (2048, 4096) for v in (32000, 128256, 151936) for k in (16, 64, 128)],
}


def main() -> None:
    """Measure every shape, print a line a way, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workspace-mb", type=int, help="default: 16 on a CPU, 512 on a GPU")
    flags = parser.parse_args()
    workspace_mb = flags.workspace_mb or (512 if flags.device == "cuda" else 16)
    figures = []
    for shape in SHAPES[flags.device]:
        problem = Problem(*shape, flags.device, workspace_mb)
        figures.append(measure(problem, flags.repeats))
        del problem
    print(f"kept in {keep('sparse-kl', flags.device, figures)}")


def measure(problem: Problem, repeats: int) -> dict[str, object]:
    """Median milliseconds and peak MiB of every way, and their ratios to the baseline; None where a way is missing."""
    available = {name: way for name, way in ways(problem).items() if way is not None}
    times = _interleaved(available, problem.device, repeats)
    peaks = {name: _peak_mb(way, problem.device) for name, way in available.items()}
    print(f"N={problem.num_rows} H={problem.hidden} V={problem.vocab} K={problem.num_kept}")
    figures: dict[str, object] = {}
    for name in ways(problem):
        if name not in available:
            figures[name] = None
            print(f"  {name:34} missing")
            continue
        ratios = [a / b for a, b in zip(times[name], times[BASELINE], strict=True)]
        figures[name] = {
            "ms": round(statistics.median(times[name]), 3),
            "time_ratio": round(statistics.median(ratios), 3),
            "peak_mb": round(peaks[name], 1),
            "peak_ratio": round(peaks[name] / peaks[BASELINE], 3),
        }
        print(f"  {name:34} {figures[name]}")
    return problem.shape() | {"baseline": BASELINE, "repeats": repeats, "ways": figures}


def _interleaved(available: dict[str, Callable[[], None]], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each way in each round; each round takes the ways in another order, as memory that one leaves
    behind helps or hinders the next."""
    times: dict[str, list[float]] = {name: [] for name in available}
    for repeat in range(repeats + 1):
        for name in random.Random(repeat).sample(list(available), len(available)):
            gc.collect()
            taken = _milliseconds(available[name], device)
            if repeat:  # the first round warms up
                times[name].append(taken)
    return times


def _milliseconds(way: Callable[[], None], device: str) -> float:
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


def _peak_mb(way: Callable[[], None], device: str) -> float:
    """Most MiB that stood at once beyond what stood before, by torch's own allocator."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        way()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    standing = peak = 0
    for _, num_bytes in changes:
        standing += num_bytes
        peak = max(peak, standing)
    return peak / 2**20


if __name__ == "__main__":
    main()
