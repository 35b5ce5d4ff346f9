"""A way for a process to end with the process that started it, even if that one is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with(parent_pid: int) -> None:
    """On Linux, ask the kernel to kill this process when its parent dies.

    Args:
        parent_pid: Process id of the parent, as the parent itself knows it.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # the parent may have died before the request took effect
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
