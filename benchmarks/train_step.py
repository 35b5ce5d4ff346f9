"""Step time and memory of distillation from a cache, compared with cross-entropy alone on the same student and batch.

python benchmarks/train_step.py                  a real shape on a CPU, float32 and bf16-mixed: the figure to report
python benchmarks/train_step.py --size toy       the demo's student, for which the loss is half of a step
python benchmarks/train_step.py --device cuda    a student of a billion parameters, bf16-mixed
python benchmarks/train_step.py --size smoke     the smallest size, to check that it works

The real shape is SmolLM2-135M with 6 of its 30 layers: 50 million parameters, 49,152 ids, and a cache by the whole
model. `--rounds` sets the length: 9 rounds take four to eight minutes on two cores.

A step is a whole training step: the loader's next batch, forward, loss, backward, clipping, and the optimizer.
Cross-entropy alone reads plain text shards, which hold no targets to decode; the others read a real cache of the same
text. All run in one process, in turn, round after round.

On a CPU, time is the CPU time of the process, which other processes on the machine disturb least. The loader decodes in
the step's own thread, so that all its work is counted, as the mean over a whole epoch because it comes in bursts. On a
GPU, time is that between synchronised ends of a round, while the loader's threads work in parallel. Ratios are medians
over rounds, with their quartiles. The data-wait fraction is the share of the time in which a step waits for its batch,
while threads decode ahead on either device. Memory is that of weights and moments, plus the peak that torch allocates
in a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import torch
from machine import RESULTS, caught, keep
from memory import peak_mb
from train_step_ways import CROSS_ENTROPY, NUM_KEPT, NUM_SAMPLES, SIZES, THREADS, Size, Way, make_cache

from capgap.pipeline.store import ShardReader, keep_freed_memory

TIME_GOALS = {"real": 1.02, "toy": 1.08, "cuda": 1.03, "smoke": 1.08}
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
DATA_WAIT_GOAL, MEMORY_GOAL = 0.005, 1.05


def main() -> None:
    """Make a cache, measure, print the figures, and write them to the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/train_step"), help="folder of corpus, teacher and cache"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the figures")
    parser.add_argument("--size", choices=["real", "toy", "smoke"], default="real", help="size on a CPU")
    parser.add_argument("--rounds", type=int, help="number of rounds, which decides how long it takes")
    flags = parser.parse_args()
    keep_freed_memory()  # as `capgap` does
    os.environ.setdefault("CAPGAP_LEASE_DIR", str((flags.work / "leases").resolve()))
    name = flags.size if flags.device == "cpu" else flags.device
    size = dataclasses.replace(SIZES[name], **({} if flags.rounds is None else {"rounds": flags.rounds}))
    kept_as = "train-step" if name in ("real", "cuda") else f"train-step-{name}"
    failed: list[str] = []
    for figures in measure(size, name, flags.device, flags.work / name, failed):
        path = keep(kept_as, flags.device, figures, flags.results)  # written after each precision
        print(f"kept in {path}")
    if failed:
        sys.exit(f"not measured: {'; '.join(failed)}")


def measure(size: Size, name: str, device: str, work: Path, failed: list[str]) -> Iterator[dict[str, Any]]:
    """Measure a step's milliseconds, ratios, data-wait fractions and memory, and whether the goals were met.

    Yields all figures so far after each precision; what could not be measured is added to `failed`.
    """
    model, corpus, cache = make_cache(size, work, device)
    sampled, student = cache.manifest.shard_sets["sampled"], corpus.manifest.shard_sets["student"]
    # only the shards that the cache was made from
    text = ShardReader(corpus.path, student.model_copy(update={"shards": student.shards[: len(sampled.shards)]}))
    readers = {
        CROSS_ENTROPY: text,
        f"sampled, n = {NUM_SAMPLES}": ShardReader(cache.path, sampled),
        f"top-{NUM_KEPT}": ShardReader(cache.path, cache.manifest.shard_sets["topk"]),
    }
    precisions: dict[str, Any] = {}
    figures = {
        "student": {key: model.config.to_dict()[key] for key in _SHAPE} | {"num_parameters": model.num_parameters()},
        "vocab_size": text.codec.vocab_size,
        "tokens_per_step": size.batch_sequences * text.codec.seq_len,
        "rounds": size.rounds,
        "steps_per_round": size.steps,
        "bytes_per_token": {
            name: round(reader.shard_set.num_bytes / reader.shard_set.num_tokens, 1) for name, reader in readers.items()
        },
        "precisions": precisions,
    }
    for precision in size.precisions:
        with caught(precision, failed):
            precisions[precision] = _measured(model, readers, size, device, precision, TIME_GOALS[name], failed)
            yield figures


def _measured(
    model: Any,
    readers: dict[str, ShardReader],
    size: Size,
    device: str,
    precision: str,
    time_goal: float,
    failed: list[str],
) -> dict[str, Any]:
    print(f"{precision}:", flush=True)
    ways: dict[str, Way] = {}
    for name, reader in readers.items():
        with caught(f"{precision}, {name}", failed):
            way = Way(name, model, reader, size, device, precision)
            way.step()  # fails here if it does not fit into memory
            ways[name] = way
    times = _interleaved(ways, size, device)
    waits = {name: _data_wait_fraction(way, size, device) for name, way in ways.items()}
    peaks = {name: way.standing_mb() + peak_mb(way.step, device) for name, way in ways.items()}
    judged = [name for name in ways if name != CROSS_ENTROPY]
    return {
        "ways": {name: _figures(name, times, waits, peaks) for name in ways},
        "goals": [goal for name in judged for goal in _goals(name, times, waits, peaks, time_goal)],
    }


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step without the loader, one number per round, and the loader's mean over all rounds."""

    work_ms: list[float]
    loader_ms: float

    @property
    def total_ms(self) -> list[float]:
        """Milliseconds of a step with the loader, one number per round."""
        return [work_ms + self.loader_ms for work_ms in self.work_ms]


def _interleaved(ways: dict[str, Way], size: Size, device: str) -> dict[str, Times]:
    """Measure the times of each way; each round takes the ways in another order."""
    work_ms: dict[str, list[float]] = {name: [] for name in ways}
    loader_s: dict[str, float] = dict.fromkeys(ways, 0.0)
    for turn in range(size.rounds + 1):
        for name in random.Random(turn).sample(list(ways), len(ways)):
            way = ways[name]
            gc.collect()
            way.waited_cpu_s = 0.0
            started = _now_s(device)
            for _ in range(size.steps):
                way.step()
            taken_s = _now_s(device) - started
            if device == "cpu":
                loader_s[name] += way.waited_cpu_s
                taken_s -= way.waited_cpu_s
            if turn:  # the first round warms up, but its loader's time counts, because later rounds use what it opened
                work_ms[name].append(1e3 * taken_s / size.steps)
    num_steps = (size.rounds + 1) * size.steps
    return {name: Times(work_ms[name], 1e3 * loader_s[name] / num_steps) for name in ways}


def _now_s(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _data_wait_fraction(way: Way, size: Size, device: str) -> float:
    """Return the share of the time of some consecutive steps in which a step waits for its batch."""
    way.batches = way.loader(THREADS)
    way.step()  # this starts the loader's threads
    way.waited_s = 0.0
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(2 * size.steps):
        way.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return way.waited_s / (time.perf_counter() - started)


def _ratios(name: str, times: dict[str, Times]) -> list[float]:
    return [a / b for a, b in zip(times[name].total_ms, times[CROSS_ENTROPY].total_ms, strict=True)]


def _figures(
    name: str, times: dict[str, Times], waits: dict[str, float], peaks: dict[str, float]
) -> dict[str, float | list[float]]:
    ratios = _ratios(name, times)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    figures: dict[str, float | list[float]] = {
        "ms": round(statistics.median(times[name].total_ms), 3),
        "of_which_loader_ms": round(times[name].loader_ms, 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
        "data_wait_fraction": round(waits[name], 4),
        "peak_mb": round(peaks[name], 1),
        "peak_ratio": round(peaks[name] / peaks[CROSS_ENTROPY], 4),
    }
    print(f"{name:24} {figures}")
    return figures


def _goals(
    name: str, times: dict[str, Times], waits: dict[str, float], peaks: dict[str, float], time_goal: float
) -> list[dict[str, object]]:
    found = {
        "step time over cross-entropy": (statistics.median(_ratios(name, times)), time_goal),
        "data-wait fraction": (waits[name], DATA_WAIT_GOAL),
        "peak memory over cross-entropy": (peaks[name] / peaks[CROSS_ENTROPY], MEMORY_GOAL),
    }
    goals = []
    for what, (value, at_most) in found.items():
        print(f"goal: {name}, {what}: {value:.4f}, at most {at_most}: {'met' if value <= at_most else 'MISSED'}")
        goals.append({"what": f"{name}, {what}", "found": round(value, 4), "at_most": at_most, "met": value <= at_most})
    return goals


if __name__ == "__main__":
    main()
