"""One log line for each finished shard: its contents, the rate, the time left and the memory taken on the device."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from capgap.pipeline.cache.shards import CacheJob, FinishedShard
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.folder import LOGS_FOLDER
from capgap.pipeline.stage.progress import Meter, progress
from capgap.pipeline.stage.scalars import CACHE_SCALARS, ScalarFile

# Several replicas finish their first shards at nearly the same moment, which says nothing about their rate.
_SETTLED_S = 5.0


class ShardLines:
    """Logs a line for each finished shard and advances the terminal's progress bar. It is thread-safe.

    The rate covers the shards of this process. It is measured from the process's beginning, so that it includes the
    teacher's start, and from the end of the first shard as soon as that is `_SETTLED_S` seconds ago.
    """

    def __init__(self, job: CacheJob, title: str, total: int, missing: list[int], meter: Meter, device: str) -> None:
        self._job, self._title, self._meter, self._device = job, title, meter, device
        self._total, self._num_done = total, total - len(missing)
        self._left_tokens = sum(job.source.shards[index].num_sequences for index in missing) * job.source.seq_len
        self._tokens, self._began = 0, time.monotonic()
        self._first: tuple[int, float] | None = None
        self._lock = threading.Lock()
        self._scalars = ScalarFile(job.folder / LOGS_FOLDER / "tensorboard" / _run_of(title), CACHE_SCALARS)

    def finished(self, index: int, shard: FinishedShard) -> None:
        """Log that this process has made shard `index`."""
        with self._lock:
            self._say(index, shard)

    def _say(self, index: int, shard: FinishedShard) -> None:
        num_tokens = shard.facts.num_targets
        num_bytes = sum(entry.file.num_bytes for entry in shard.entries.values())
        self._num_done += 1
        self._tokens += num_tokens
        self._left_tokens -= num_tokens
        now = time.monotonic()
        rate = self._rate(now)
        eta_s = max(self._left_tokens, 0) / rate
        memory_bytes = device_memory_bytes(self._device)
        self._meter.advance(self._job.source.shards[index].num_sequences, tokens=num_tokens)
        event(
            "shard",
            f"{self._title}: shard {index}, {self._num_done} of {self._total}: {num_tokens:,} tokens, "
            f"{num_bytes / num_tokens:.2f} bytes/token, {rate:,.0f} tokens/s, {eta_s:.0f} s left"
            + ("" if memory_bytes is None else f", {memory_bytes / 1e9:.2f} GB on {self._device}"),
            shard=index,
            num_done=self._num_done,
            num_shards=self._total,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            bytes_per_token=round(num_bytes / num_tokens, 3),
            tokens_per_s=round(rate, 1),
            eta_s=round(eta_s, 1),
            device=self._device or None,
            device_memory_bytes=memory_bytes,
        )
        figures: dict[str, float | None] = {
            "num_shards": self._num_done,
            "num_tokens": self._tokens,
            "tokens_per_s": rate,
        }
        figures |= {"bytes_per_token": num_bytes / num_tokens, "memory_bytes": memory_bytes}
        self._scalars.add(self._num_done, figures)
        self._first = self._first or (num_tokens, now)

    def _rate(self, now: float) -> float:
        tokens, since = self._first or (0, self._began)
        if now - since < _SETTLED_S:
            tokens, since = 0, self._began
        return (self._tokens - tokens) / max(now - since, 1e-9)


def _run_of(title: str) -> str:
    """Return the name of a slice's own TensorBoard run, with host and pid, as several processes may share a slice."""
    _, _, part = title.partition(": slice ")
    return f"slice-{part.replace('/', '-')}-{os.uname().nodename}-{os.getpid()}" if part else ""


@contextmanager
def shard_lines(job: CacheJob, title: str, wanted: list[int], done: set[int], device: str) -> Iterator[ShardLines]:
    """Show the progress of a cache while the block runs, and yield the object that logs its shards.

    Args:
        job: the cache's job.
        title: beginning of each line.
        wanted: indices of the shards to be made, finished ones included.
        done: indices of the shards that are finished already.
        device: device whose memory the lines report; empty where this process holds no device.
    """
    sizes = [shard.num_sequences for shard in job.source.shards]
    num_finished = sum(sizes[index] for index in wanted if index in done)
    num_sequences = sum(sizes[index] for index in wanted)
    with progress(title, num_sequences, "sequences", num_finished, lines=False) as meter:
        missing = [index for index in wanted if index not in done]
        yield ShardLines(job, title, len(wanted), missing, meter, device)


def device_memory_bytes(device: str) -> int | None:
    """Return the bytes that all processes take on a GPU, or on `cpu` this process; None where they are not known."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return int(total - free)
    statm = Path("/proc/self/statm")
    if device != "cpu" or not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * resource.getpagesize()
