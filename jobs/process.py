"""Ends a stage's process with the driver that started it, even if the driver is killed."""

from __future__ import annotations

import os

from capgap.pipeline.stage.orphans import die_with


def die_with_driver() -> None:
    """On Linux, ask the kernel to kill this process when its driver dies (CAPGAP_DRIVER_PID), or torchrun does."""
    driver = os.environ.pop("CAPGAP_DRIVER_PID", None)
    if driver is not None:
        die_with(int(driver))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
