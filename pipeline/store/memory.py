"""Memory that was freed stays mapped, because a loader asks for as much again at once."""

from __future__ import annotations

import ctypes
import sys

# glibc's numbers of the settings, and the largest threshold that it takes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -1, -3, 32 << 20
# what a loader holds of decoded blocks, unless it is told otherwise
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 1 GB of freed memory, and blocks of up to 32 MB in it; elsewhere, do nothing.

    By default a decoded member's arrays go back to the system when they are dropped, and every page of the next one's
    is mapped and cleared anew: half of the time of decoding `topk`. The setting holds for the whole process, so it is
    made by programs (`capgap` does), not by the loader.

    Returns:
        Whether it was taken.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    )
