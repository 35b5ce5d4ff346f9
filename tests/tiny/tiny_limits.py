"""A bound on what a test may ask of the machine: lengths that a damaged file claims and somebody believes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bounded_memory(more_bytes: int) -> Iterator[None]:
    """Address space for that much more than is in use."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + more_bytes, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
