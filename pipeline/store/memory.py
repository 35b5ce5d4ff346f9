"""Keeping freed memory mapped in the process, because a loader soon allocates the same amount again."""

from __future__ import annotations

import ctypes
import sys

# glibc's numbers of the two settings, and the largest threshold in bytes that it accepts
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -1, -3, 32 << 20
# the default of LoaderSettings.max_block_bytes
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 1 GiB of freed memory, and to allocate blocks of up to 32 MiB in it.

    By default, the arrays of a decoded member are returned to the system when they are dropped, and every page of the
    next member's arrays is mapped and cleared again, which takes half of the time of decoding `topk`. The setting
    applies to the whole process, so programs make it (`capgap` does), not the loader. Without glibc, nothing happens.

    Returns:
        Whether the setting was accepted.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    )
