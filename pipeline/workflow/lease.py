"""The lease: one stage at a time on one device, whoever started it.

A lease is an operating-system lock on a file named after the device, so it ends with the process that holds it,
however that process ends. This is what keeps teacher and student from ever being on one device at once.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from capgap.schemas.errors import MachineError

_LOG = logging.getLogger("capgap")


def device_identity(device: str) -> str:
    """A name of the device that is the same for every process of the machine: `cpu`, or the GPU's UUID."""
    if device == "cpu":
        return "cpu"
    import torch

    return f"gpu-{torch.cuda.get_device_properties(torch.device(device)).uuid}"


@contextmanager
def lease(device: str, holder: str, wait: bool) -> Iterator[None]:
    """Hold the device while the block runs.

    Args:
        device: `cpu` or `cuda:0`.
        holder: stage and run, shown to whoever waits.
        wait: wait for another holder to end, or raise.

    Raises:
        MachineError: another stage holds the device and `wait` is off.
    """
    folder = Path(os.environ.get("CAPGAP_LEASE_DIR") or Path(tempfile.gettempdir()) / "capgap-leases")
    folder.mkdir(parents=True, exist_ok=True)
    name = device_identity(device)
    # soft errors of a shared folder: another user's file may be there, so everyone may write it
    lock = FileLock(folder / f"{name}.lock", mode=0o666)
    note = folder / f"{name}.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        current = _holder_of(note)
        if not wait:
            raise MachineError(
                "the device is in use", where=name, found=current, fix="wait for it to end, or leave out --no-wait"
            ) from None
        _LOG.info("waiting for %s, held by %s", name, current)
        lock.acquire()
    try:
        note.write_text(json.dumps({"holder": holder, "pid": os.getpid()}))
        yield
    finally:
        lock.release()


def _holder_of(note: Path) -> str:
    try:
        values = json.loads(note.read_text())
        return f"{values['holder']} (pid {values['pid']})"
    except (OSError, ValueError, KeyError):
        return "another stage"
