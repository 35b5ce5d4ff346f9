"""A stage's process ends with the driver that started it, even if the driver is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_driver() -> None:
    """On Linux, ask the kernel to kill this process when the driver named in the environment dies."""
    driver = os.environ.pop("CAPGAP_DRIVER_PID", None)
    if driver is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # the driver may have died before the request took effect
    if os.getppid() != int(driver):
        os.kill(os.getpid(), signal.SIGKILL)
