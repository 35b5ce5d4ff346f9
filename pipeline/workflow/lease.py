"""The lease: one stage at a time on one device, whoever started it.

A lease is an operating-system lock on a file named after the device, so it ends with the process that holds it,
however that process ends. This is what keeps teacher and student from ever being on one device at once. The processes
of one stage, its slices and replicas, may share a lease: they are one model.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from capgap.pipeline.workflow.locks import ProcessLock
from capgap.schemas.errors import MachineError

_LOG = logging.getLogger("capgap")
_POLL_S = 0.1
_ALONE = ""


def device_identity(device: str) -> str:
    """A name of the device that is the same for every process of the machine: `cpu`, or the GPU's UUID."""
    if device == "cpu":
        return "cpu"
    import torch

    return f"gpu-{torch.cuda.get_device_properties(torch.device(device)).uuid}"


@contextmanager
def leases(devices: list[str], holder: str, wait: bool, group: str = _ALONE) -> Iterator[None]:
    """Hold devices while the block runs, taken in the order of their names: no two holders wait for one another.

    Args:
        devices: `cpu` or `cuda:0` and so on.
        holder: stage and run, shown to whoever waits.
        wait: wait for another holder to end, or raise.
        group: processes that name the same group hold them together, for example the slices of one folder; whoever
            names none holds them alone.

    Raises:
        MachineError: another stage holds a device and `wait` is off.
    """
    folder = Path(os.environ.get("CAPGAP_LEASE_DIR") or Path(tempfile.gettempdir()) / "capgap-leases")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name in sorted(device_identity(device) for device in devices):
            _take(stack, folder, name, holder, wait, group)
        yield


def _take(stack: ExitStack, folder: Path, name: str, holder: str, wait: bool, group: str) -> None:
    # soft errors of a shared folder: another user's file may be there, so everyone may write it
    lock = stack.enter_context(ProcessLock(folder / f"{name}.lock", mode=0o666))
    turn = stack.enter_context(ProcessLock(folder / f"{name}.turn", mode=0o666))
    note = folder / f"{name}.json"
    waiting = False
    while not _taken(lock, turn, note, holder, group):
        if not wait:
            raise MachineError(
                "the device is in use",
                where=name,
                found=_holder_of(note),
                fix="wait for it to end, or leave out --no-wait",
            )
        if not waiting:
            _LOG.info("waiting for %s, held by %s", name, _holder_of(note))
        waiting = True
        time.sleep(_POLL_S)


def _taken(lock: ProcessLock, turn: ProcessLock, note: Path, holder: str, group: str) -> bool:
    """One attempt. A group's first member has the device alone while it writes the note that the others go by."""
    turn.exclusive(wait=True)
    try:
        if lock.exclusive():
            note.write_text(json.dumps({"holder": holder, "pid": os.getpid(), "group": group}))
            return group == _ALONE or lock.shared()
        if group != _ALONE and lock.shared():
            if _note_of(note).get("group") == group:
                return True
            lock.release()
        return False
    finally:
        turn.release()


def _holder_of(note: Path) -> str:
    values = _note_of(note)
    try:
        return f"{values['holder']} (pid {values['pid']})"
    except KeyError:
        return "another stage"


def _note_of(note: Path) -> dict[str, object]:
    try:
        values = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
