"""The cost of a stored token: bytes by part, what its distribution loses, and how fast it is written and read.

python benchmarks/store.py                                       vocabularies of 32,768 and 131,072 ids
python benchmarks/store.py --vocab-sizes 32768                    one of them
python benchmarks/store.py --distillkit ~/DistillKit             also DistillKit's own code, on the same rows
python benchmarks/store.py --page docs/format.md                 write the kept figures as tables into that page

Teacher and text are made from this Python's own library (teacher_rows.py) and kept in --folder; the first time takes
about ten minutes per vocabulary. The codecs are compared with plain int32 and float32 arrays, with the bytes that
simple models would take (entropy_bounds.py), and with the computed bytes of other programs' layouts at equal k.
`host part` is the host's work where a device decodes: read, check, decompress, and gather into one buffer.

Legend: S sequences, L targets per sequence, K ids kept, N = S x L rows, T extra temperatures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
import zstandard
from distillkit_rows import DistillKit
from entropy_bounds import bounds
from fidelity import fidelity
from loader import throughput
from machine import keep
from store_page import fill_page
from stored_parts import PARTS, parts_of
from teacher_rows import NUM_KEPT, NUM_SAMPLES, REGIMES, rows_of

from capgap.pipeline.cache.convert import to_targets
from capgap.pipeline.cache.scoring import Scored
from capgap.pipeline.store import Block, Codec, Ranking, ShardReader, ShardWriter, keep_freed_memory, split_blocks
from capgap.pipeline.store.codec import PROFILES, SAMPLED, TOPK_CODECS
from capgap.pipeline.store.ranking import RANKING_NAME
from capgap.pipeline.store.stored_batch import gather
from capgap.schemas.records import Sequences, TopkTargets
from capgap.schemas.run_cache import RecordingName

Way = Callable[[], object]


def main() -> None:
    """Measure every vocabulary, temperature and codec, print a table, and write the figures to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--steps", type=int, default=300, help="training steps of the Llama")
    parser.add_argument("--folder", type=Path, default=Path("runs/teacher-rows"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--distillkit", type=Path, help="folder of a checkout of DistillKit, to measure it too")
    parser.add_argument("--page", type=Path, help="measure nothing, and write the kept figures into this page")
    flags = parser.parse_args()
    if flags.page:
        fill_page(flags.page)
        return
    torch.set_num_threads(1)
    keep_freed_memory()  # as `capgap` does
    peer = DistillKit(flags.distillkit) if flags.distillkit else None
    figures = []
    for vocab_size in flags.vocab_sizes:
        made = rows_of(flags.folder, vocab_size, flags.steps)
        for regime in REGIMES:
            figures += measure(regime, made[regime], flags.repeats, peer)
    print(f"kept in {keep('store-codecs', 'cpu', figures)}")
    loaders = measure_loaders(made[next(iter(REGIMES))], flags.repeats)
    print(json.dumps(loaders, indent=1))
    print(f"kept in {keep('store-loaders', 'cpu', loaders)}")


def measure_loaders(rows: dict[str, np.ndarray], repeats: int) -> list[dict[str, Any]]:
    """Return the tokens per second of capgap's loader and others on the same members: the rows, repeated 64 times."""
    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for name in (SAMPLED, TOPK_CODECS["near-lossless"], TOPK_CODECS["compact"]):
            reader = write_cache(Path(scratch) / name, rows, name, num_shards=64)
            found.append({"codec": name} | throughput(reader, Path(scratch) / f"{name}-others", repeats))
        return found


def write_cache(folder: Path, rows: dict[str, np.ndarray], codec_name: str, num_shards: int = 1) -> ShardReader:
    """Write a regime's rows as shards in that codec; each shard has all rows, 32,768 tokens in four members."""
    codec = codec_of(rows, codec_name)
    folder.mkdir(parents=True, exist_ok=True)
    assert codec.ranking is not None
    (folder / RANKING_NAME).write_bytes(codec.ranking.data)
    writer = ShardWriter(folder, folder / "sidecars", "targets", codec)
    blocks = blocks_of(rows, "sampled" if codec_name == SAMPLED else "topk")
    return ShardReader(folder, writer.shard_set([writer.write(index, blocks) for index in range(num_shards)]))


def codec_of(rows: dict[str, np.ndarray], name: str) -> Codec:
    """Return the codec for these rows, with ids ranked by their frequency in the training text."""
    ranking = Ranking(np.argsort(-rows["train_counts"], kind="stable").astype(np.int32))
    num_ids = NUM_SAMPLES if name == SAMPLED else NUM_KEPT
    return Codec(name, rows["tokens"].shape[1] - 1, len(ranking.ids_V), num_ids, ranking)


def measure(
    regime: str, rows: dict[str, np.ndarray], repeats: int, peer: DistillKit | None = None
) -> list[dict[str, Any]]:
    """Return one entry per codec; their speeds are measured in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        return _measure(regime, rows, repeats, peer, Path(scratch))


def _measure(
    regime: str, rows: dict[str, np.ndarray], repeats: int, peer: DistillKit | None, scratch: Path
) -> list[dict[str, Any]]:
    num_ids, length = len(rows["train_counts"]), rows["tokens"].shape[1] - 1
    shared = {
        "regime": regime,
        "vocab_size": num_ids,
        "temperature": round(float(rows["temperature"]), 4),
        "entropy_nats": round(float(rows["entropy"].mean()), 3),
        "label_loss_nats": round(-float(rows["labels"].mean()), 3),
        "tail": round(float(rows["tail"].mean()), 4),
        "num_tokens": rows["tokens"].shape[0] * length,
        "repeats": repeats,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print("; ".join(f"{name} {value}" for name, value in shared.items()))
    blocks = {kind: blocks_of(rows, kind) for kind in ("sampled", "topk")}
    entries: list[dict[str, Any]] = []
    ways: dict[str, Way] = {}
    for name in (SAMPLED, *TOPK_CODECS.values()):
        kind = "sampled" if name == SAMPLED else "topk"
        codec = codec_of(rows, name)
        data = [codec.encode(block.sequences, block.targets) for block in blocks[kind]]
        ways |= _ways(codec, blocks[kind], data) | _host_ways(write_cache(scratch / name, rows, name))
        entry = shared | {"codec": name, **_bytes_of(data, shared["num_tokens"])}
        found = [codec.decode(member, "here")[1] for member in data]
        entry |= bounds(found, PROFILES.get(name), num_ids)
        if kind == "topk":
            entry |= fidelity([block.targets for block in blocks[kind]], found, rows["student"])
        entries.append(entry)
    if peer is not None:
        theirs, their_ways = peer.measure([block.targets for block in blocks["topk"]], rows["student"], num_ids)
        entries += [shared | entry for entry in theirs]
        ways |= their_ways
    ways |= _plain_ways(blocks["topk"])
    speeds = _speeds(ways, shared["num_tokens"], repeats)
    for entry in entries:
        for way in ("encode", "decode", "host part"):
            if f"{way} {entry['codec']}" in speeds:
                median, fastest = speeds[f"{way} {entry['codec']}"]
                stem = way.replace(" ", "_")
                entry |= {f"{stem}_tokens_per_cpu_s": median, f"{stem}_fastest_tokens_per_cpu_s": fastest}
        _print(entry)
    others = _others(rows, blocks, num_ids)
    plain_speeds = {f"{way}_tokens_per_cpu_s": speeds[f"{way} plain topk"][0] for way in ("encode", "decode")}
    for name, num_bytes in others.items():
        entry = shared | {"codec": name, "bytes_per_token": num_bytes}
        entries.append(entry | plain_speeds if name == "plain topk 64" else entry)
        _print(entries[-1])
    return entries


def blocks_of(rows: dict[str, np.ndarray], kind: RecordingName) -> list[Block]:
    """Return the rows as the cache stage makes them, in blocks of 8192 targets."""
    tokens_SL1 = rows["tokens"]
    shape = (len(tokens_SL1), tokens_SL1.shape[1] - 1)
    of = {
        key: rows[key].reshape(*shape, *rows[key].shape[1:]) for key in ("ids", "logprobs", "tail", "labels", "samples")
    }
    no_tails_SLT = np.zeros((*shape, 0), np.float32)
    columns = [of["samples"], of["ids"], of["logprobs"], of["tail"], no_tails_SLT, of["labels"]]
    scored = [Scored(*(column[s] for column in columns), top_logprob=0.0) for s in range(len(tokens_SL1))]
    blocks, start = [], 0
    for part in split_blocks(Sequences(tokens_SL1, rows["starts"], np.ones(tokens_SL1.shape, np.bool_))):
        blocks.append(Block(part, to_targets(scored[start : start + len(part)], kind)))
        start += len(part)
    return blocks


def _bytes_of(data: list[bytes], num_tokens: int) -> dict[str, Any]:
    """Return bytes per token, of whole members and of each part compressed alone; overhead is the rest."""
    total = sum(len(member) for member in data) / num_tokens
    members = [parts_of(member) for member in data]
    parts = {part: sum(member[part] for member in members) / num_tokens for part in PARTS}
    parts["overhead"] = total - sum(parts.values())
    return {"bytes_per_token": round(total, 2), **{f"{part}_bytes": round(size, 2) for part, size in parts.items()}}


def _ways(codec: Codec, blocks: list[Block], data: list[bytes]) -> dict[str, Way]:
    return {
        f"encode {codec.name}": lambda: [codec.encode(block.sequences, block.targets) for block in blocks],
        f"decode {codec.name}": lambda: [codec.decode(member, "here") for member in data],
    }


def _host_ways(reader: ShardReader) -> dict[str, Way]:
    """Return the host's work where a device decodes: read each member, and gather its sequences into a buffer."""

    def read() -> None:
        for member in range(reader.shard_set.num_members):
            block = reader.read_stored(0, member)
            gather([(block, row) for row in range(len(block))], pin=False)

    return {f"host part {reader.codec.name}": read}


def _plain_ways(blocks: list[Block]) -> dict[str, Way]:
    """Return ways that only copy the same arrays as they are, int32 and float32."""
    arrays = [[*vars(block.sequences).values(), *vars(block.targets).values()] for block in blocks]
    data = [[array.tobytes() for array in of] for of in arrays]
    kinds = [array.dtype for array in arrays[0]]
    return {
        "encode plain topk": lambda: [[array.tobytes() for array in of] for of in arrays],
        "decode plain topk": lambda: [
            [np.frombuffer(one, kind).copy() for one, kind in zip(of, kinds, strict=True)] for of in data
        ],
    }


def _speeds(ways: dict[str, Way], num_tokens: int, repeats: int) -> dict[str, tuple[int, int]]:
    """Return tokens per CPU second, median and fastest; every repeat runs all ways, and the first is not counted.

    Other processes share the machine's caches and hyper-threads, and the fastest repeat is the least disturbed one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return {
        name: (round(num_tokens / statistics.median(taken)), round(num_tokens / min(taken)))
        for name, taken in seconds.items()
    }


def _others(rows: dict[str, np.ndarray], blocks: dict[str, list[Block]], num_ids: int) -> dict[str, float]:
    """Return the bytes per token of other layouts.

    The other programs' layouts hold neither tokens nor labels' logprobs, which take 2 to 3 bytes in capgap's.
    """
    id_bits = math.ceil(math.log2(num_ids))
    ids_a_row = sum(len(block.targets.ids_D) for block in blocks["sampled"]) / rows["labels"].size
    return {
        # 4 bytes for each id and each count or logprob, and 4 for the label's logprob, the number of ids or tail, and
        # token
        "plain sampled 50": round(8 * ids_a_row + 4 * 3, 2),
        "plain topk 64": float(8 * NUM_KEPT + 4 * 3),
        # ids bit-packed, the first 16 logprobs in bfloat16, six float32 coefficients of a polynomial for the others
        "DistillKit's layout, k=64, 16 exact, polynomial": id_bits * NUM_KEPT / 8 + 16 * 2 + 6 * 4,
        "DistillKit's layout, k=64, bfloat16": id_bits * NUM_KEPT / 8 + NUM_KEPT * 2,
        "DistillKit's layout, k=128, as recommended": id_bits * 128 / 8 + 16 * 2 + 6 * 4,
        "Megatron-LM's layout, k=64, zstd 3": round(_megatron(blocks["topk"]), 2),
    }


def _megatron(blocks: list[Block]) -> float:
    """Return bytes per token of Megatron-LM's arrays in zstd frames: float16 logprobs, 16 bits of ids, a 17th bit."""
    num_bytes = num_tokens = 0
    for block in blocks:
        targets = block.targets
        assert isinstance(targets, TopkTargets)
        arrays = (
            targets.logprobs_BLK.astype(np.float16),
            targets.ids_BLK.astype(np.uint16),
            (targets.ids_BLK >> 16).astype(np.bool_),
        )
        num_bytes += len(zstandard.compress(b"".join(array.tobytes() for array in arrays), 3))
        num_tokens += targets.tail_BL.size
    return num_bytes / num_tokens


def _print(entry: dict[str, Any]) -> None:
    about = f"  {entry['codec']:38} {entry['bytes_per_token']:7.2f} B"
    parts = [f"{part} {entry[f'{part}_bytes']:.2f}" for part in (*PARTS, "overhead") if f"{part}_bytes" in entry]
    if parts:
        about += f" = {' + '.join(parts)}"
    if "kl_nats" in entry:
        about += f"; KL {entry['kl_nats']:.1e}, gradient {entry['gradient_error']:.2e}"
    if "encode_tokens_per_cpu_s" in entry:
        speeds = (entry[f"{way}_tokens_per_cpu_s"] / 1e6 for way in ("encode", "decode"))
        about += "; encode {:.2f} M/s, decode {:.2f} M/s".format(*speeds)
    if "encode_fastest_tokens_per_cpu_s" in entry:
        fastest = (entry[f"{way}_fastest_tokens_per_cpu_s"] / 1e6 for way in ("encode", "decode"))
        about += " (fastest {:.2f}, {:.2f})".format(*fastest)
    print(about)


if __name__ == "__main__":
    main()
