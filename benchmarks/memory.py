"""Measure the peak memory that a call takes from torch's allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def peak_mb(call: Callable[[], object], device: str) -> float:
    """Return the peak memory of the call, in MiB, beyond what was allocated before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    standing = peak = 0
    for _, num_bytes in changes:
        standing += num_bytes
        peak = max(peak, standing)
    return peak / 2**20
