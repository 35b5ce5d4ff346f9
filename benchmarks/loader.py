"""Compare the loader with WebDataset, MosaicML Streaming and LitData on the same members; measure start-up and memory.

python benchmarks/loader.py                   tokens/s, interleaved medians; start-up; resident memory
python benchmarks/loader.py --quick           about a tenth of the work
python benchmarks/loader.py --cache FOLDER    also measure a cache's first two million tokens

Streaming and LitData are measured where they are installed. They pin other versions of packages than capgap does, so
install them in an environment of their own, and run this script in it:

    python3.11 -m venv /tmp/peers
    /tmp/peers/bin/pip install mosaicml-streaming==0.13.0 litdata==0.2.76 webdataset==1.0.2 pyarrow zstandard \\
        pydantic fsspec
    /tmp/peers/bin/pip install --no-deps -e .
    OMP_NUM_THREADS=1 /tmp/peers/bin/python benchmarks/loader.py
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from loader_peers import peers
from machine import keep

from capgap.pipeline.store import (
    Block,
    Codec,
    LoaderSettings,
    SequenceLoader,
    ShardReader,
    ShardWriter,
    codec_for,
    keep_freed_memory,
)
from capgap.pipeline.store.batch import Batch
from capgap.pipeline.store.codec import TOPK
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import Manifest, ShardSet
from capgap.schemas.records import Sequences, TopkTargets

NUM_KEPT, VOCAB_SIZE = 64, 32_000
MICRO_BATCH_TOKENS = 8192
NUM_WORKERS = 2


def main() -> None:
    """Measure, print the figures, and write them to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="measure this cache too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(child(*json.loads(flags.child))))
        return
    torch.set_num_threads(1)
    keep_freed_memory()  # as `capgap` does; forked worker processes inherit it
    with tempfile.TemporaryDirectory() as scratch:
        small = flags.quick
        figures = {
            "throughput, tokens/s": [
                throughput(reader, Path(scratch) / f"others-{number}", 3 if small else 5)
                for number, reader in enumerate(readers(Path(scratch), 8 if small else 64, flags.cache))
            ],
            "start-up to the first batch, s": start_up(Path(scratch), (1, 100) if small else (1, 10_000), 3),
            "resident memory at the end, MB": memory(Path(scratch), 40 if small else 400),
        }
    print(json.dumps(figures, indent=1))
    print(f"kept in {keep('loader', 'cpu', figures)}")


def readers(scratch: Path, num_members: int, cache: Path | None) -> list[ShardReader]:
    """Return readers of made-up rows in long and in short sequences, and of the given cache."""
    made = [make_cache(scratch / f"{seq_len}", seq_len, [num_members // 8] * 8) for seq_len in (2048, 256)]
    if cache is None:
        return made
    manifest = Manifest.model_validate_json((cache / "manifest.json").read_bytes())
    recordings = CacheFacts.model_validate(manifest.facts).recordings
    return [*made, *(ShardReader(cache, manifest.shard_sets[name]) for name in recordings)]


def throughput(reader: ShardReader, scratch: Path, repeats: int, max_tokens: int = 2_000_000) -> dict[str, Any]:
    """Return the tokens per second of an epoch's first `max_tokens`, each loader in turn, on the same members.

    Args:
        reader: Reader of shards on a local disk.
        scratch: An empty folder for copies in the formats of the other loaders.
        repeats: Number of rounds; the figures are medians over them.
        max_tokens: Most tokens that a round reads; whole shards are copied until they hold that many.
    """
    reader = _shortened(reader, max_tokens)
    seq_len = reader.codec.seq_len
    micro_batch = max(1, MICRO_BATCH_TOKENS // seq_len)
    others = peers(reader, scratch)
    ways: dict[str, Callable[[], Iterator[Batch]]] = {}
    for workers, threads, processes in ((NUM_WORKERS, "2 threads", "2 workers"), (0, "no threads", "no workers")):
        ways[f"capgap, {threads}"] = partial(_ours, reader, micro_batch, workers)
        for name, peer in others.items():
            ways[f"{name}, {processes}"] = partial(peer, reader, micro_batch, workers)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu_rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started, cpu_started, tokens = time.perf_counter(), cpu_s(), 0
            for batch in itertools.takewhile(lambda _: tokens < max_tokens, way()):  # noqa: B023
                tokens += batch.num_tokens
            gc.collect()  # ends worker processes, so that their CPU time is counted
            rates[name].append(tokens / (time.perf_counter() - started))
            cpu_rates[name].append(tokens / (cpu_s() - cpu_started))
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    per_cpu = {f"{name}, per CPU-second": round(statistics.median(values)) for name, values in cpu_rates.items()}
    ratios = {
        f"capgap, {threads} over {name}, {processes}": round(
            medians[f"capgap, {threads}"] / medians[f"{name}, {processes}"], 2
        )
        for threads, processes in (("2 threads", "2 workers"), ("no threads", "no workers"))
        for name in others
    }
    about = {"seq_len": seq_len, "tokens": reader.shard_set.num_tokens, "repeats": repeats}
    return about | medians | per_cpu | ratios


def _ours(reader: ShardReader, micro_batch: int, threads: int) -> Iterator[Batch]:
    return iter(SequenceLoader(reader, LoaderSettings(micro_batch, 0, threads=threads)))


def _shortened(reader: ShardReader, max_tokens: int) -> ShardReader:
    """Return a reader of the fewest first shards that hold `max_tokens` tokens."""
    shard_set = reader.shard_set
    held = itertools.accumulate(shard.num_sequences * shard_set.seq_len for shard in shard_set.shards)
    number = 1 + sum(tokens < max_tokens for tokens in held)
    return ShardReader(reader.place, shard_set.model_copy(update={"shards": shard_set.shards[:number]}))


def start_up(scratch: Path, numbers: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Return the seconds from the manifest's text to the first batch, for each number of shards, without imports."""
    found: dict[str, Any] = {}
    for number in numbers:
        folder = scratch / f"shards-{number}"
        reader = make_cache(folder, 256, [max(1, 64 // number)] * min(number, 64))
        entries = reader.shard_set.shards
        # many entries name the same files, because only the number of entries matters
        many = reader.shard_set.model_copy(update={"shards": tuple(entries[i % len(entries)] for i in range(number))})
        (folder / "set.json").write_text(many.model_dump_json())
        runs = [run_child("start", str(folder), 256) for _ in range(repeats)]
        found[f"{number} shards"] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return found


def memory(scratch: Path, num_members: int) -> dict[str, Any]:
    """Return the resident memory after one epoch, and after one over ten times as many members (each listed ten times).

    There are 8 ids per token, so that the smaller set also fills the 150 MB that decoded blocks may take.
    """
    folder = scratch / "memory"
    reader = make_cache(folder, 256, [num_members // 8] * 8, top_k=8)
    found = {}
    for times in (1, 10):
        many = reader.shard_set.model_copy(update={"shards": reader.shard_set.shards * times})
        (folder / "set.json").write_text(many.model_dump_json())
        found[f"{many.num_tokens:,} tokens"] = run_child("epoch", str(folder), 256)
    return found


def child(what: str, folder: str, seq_len: int) -> dict[str, float]:
    """Make one measurement; `run_child` runs this in a fresh process."""
    text = (Path(folder) / "set.json").read_text()
    started = time.perf_counter()
    shard_set = ShardSet.model_validate_json(text)
    parsed = time.perf_counter()
    loader = SequenceLoader(
        ShardReader(Path(folder), shard_set),
        LoaderSettings(MICRO_BATCH_TOKENS // seq_len, 0, max_block_bytes=150 << 20),
    )
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    if what == "start":
        batches.close()
        return {"manifest parsed": round(parsed - started, 4), "first batch": round(first - parsed, 4)}
    for _ in batches:
        pass
    return {"MB": resident_mb(), "seconds": round(time.perf_counter() - started, 2)}


def run_child(what: str, folder: str, seq_len: int) -> dict[str, float]:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([what, folder, seq_len])]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def cpu_s() -> float:
    """Return the CPU seconds of this process and of the worker processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resident_mb() -> float:
    """Return the resident memory of this process, in MiB."""
    with Path("/proc/self/status").open() as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def make_cache(folder: Path, seq_len: int, members_of_shards: list[int], top_k: int = NUM_KEPT) -> ShardReader:
    """Write shards of made-up rows, whose ids and logprobs have about the entropy of a real teacher's."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = codec_for(TOPK, seq_len, {"vocab_size": VOCAB_SIZE, "num_ids": top_k})
    writer = ShardWriter(folder, folder / "sidecars", "targets", codec)
    rng = np.random.default_rng(0)
    shards = [
        writer.write(index, (make_block(codec, rng) for _ in range(number)))
        for index, number in enumerate(members_of_shards)
    ]
    return ShardReader(folder, writer.shard_set(shards))


def make_block(codec: Codec, rng: np.random.Generator) -> Block:
    """Return a block of 8k tokens, in which each real next token is one of the ids kept."""
    num, length, kept = MICRO_BATCH_TOKENS // codec.seq_len, codec.seq_len, codec.num_ids
    # a row's ids are distinct: they start at a number that is likely to be low, and each is larger than the one before
    starts_BL1 = (VOCAB_SIZE // 2 * rng.random((num, length, 1)) ** 4).astype(np.int32)
    ids_BLK = starts_BL1 + np.cumsum(rng.integers(1, 200, (num, length, kept)), axis=2, dtype=np.int32)
    falls_BLK = np.cumsum(rng.exponential(0.15, (num, length, kept)), axis=2)
    weights_BLK = np.exp(-falls_BLK)
    probs_BLK = 0.9 * weights_BLK / weights_BLK.sum(2, keepdims=True)
    logprobs_BLK = np.log(probs_BLK).astype(np.float32)
    pick_BL1 = rng.integers(0, 8, (num, length, 1))
    tokens_BL1 = np.zeros((num, length + 1), np.int32)
    tokens_BL1[:, 1:] = np.take_along_axis(ids_BLK, pick_BL1, 2)[:, :, 0]
    starts = np.zeros(tokens_BL1.shape, np.bool_)
    targets = TopkTargets(
        ids_BLK,
        logprobs_BLK,
        np.full((num, length), 0.1, np.float32),
        np.take_along_axis(logprobs_BLK, pick_BL1, 2)[:, :, 0],
        np.zeros((num, length, 0), np.float32),
    )
    return Block(Sequences(tokens_BL1, starts, ~starts), targets)


if __name__ == "__main__":
    main()
