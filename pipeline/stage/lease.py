"""The lease: one stage at a time on one device, whoever started it.

A lease is an operating-system lock on a file named after the device, so it ends with the process that holds it,
however that process ends. It ensures that teacher and student are never on one device at once. The slices or replicas
of one stage may share a lease, because they run one model.

    cpu.lock   held by the stage          cpu.turn   held for a moment by a process that asks for the lease
    cpu.json   the note: who holds it     all three are in a folder that every user of the machine may write to
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from capgap.pipeline.stage.device import device_identity
from capgap.pipeline.stage.events import event
from capgap.pipeline.store.locks import ProcessLock, open_shared
from capgap.schemas.errors import MachineError

_POLL_S = 0.1
_ALONE = ""
_GROUP_VARIABLE = "CAPGAP_CPU_GROUP"

# everyone may make files here, and nobody may remove another's
_FOLDER_MODE = 0o777 | stat.S_ISVTX
_FILE_MODE = 0o666

_Note = dict[str, object]


@contextmanager
def leases(devices: list[str], holder: str, wait: bool, group: str = _ALONE) -> Iterator[None]:
    """Hold devices while the block runs.

    They are taken in the order of their names, so that no two holders wait for each other.

    Args:
        devices: `cpu`, or `cuda:0` and so on.
        holder: Stage and run, shown to whoever waits.
        wait: Whether to wait for another holder to end, or raise.
        group: Name under which several processes hold the devices together, for example the slices of one folder;
            empty to hold them alone.

    Raises:
        MachineError: Another stage holds a device and `wait` is off; or the folder of leases cannot be used.
    """
    folder = lease_folder()
    with ExitStack() as stack:
        for name in sorted(device_identity(device) for device in devices):
            _take(stack, folder, name, holder, wait, group)
        yield


@dataclass(frozen=True)
class LeaseRequest:
    """How a replica in a process of its own asks for its devices, with the arguments of `leases`."""

    holder: str
    wait: bool
    group: str

    def leases(self, devices: list[str]) -> AbstractContextManager[None]:
        """Hold these devices while the block runs; raises MachineError where `leases` does."""
        return leases(devices, self.holder, self.wait, self.group)


@dataclass(frozen=True)
class HeldLease:
    """A lease that somebody holds on this machine.

    Attributes:
        device: `cpu`, or a GPU's UUID as part of a file name.
        holder: Stage and run.
        pid: Id of the process that took the lease; in a group, of the first process.
        since: Time at which the lease was taken, as ISO 8601.
    """

    device: str
    holder: str
    pid: int
    since: str


def held_leases() -> list[HeldLease]:
    """Return who holds which device of this machine now, without disturbing processes that ask for a lease meanwhile.

    Leases of users whose lease files others may not read are left out.
    """
    held = []
    folder = lease_folder()
    for path in sorted(folder.glob("*.lock")):
        device = path.name.removesuffix(".lock")
        with (
            contextlib.suppress(PermissionError, FileNotFoundError),
            ProcessLock(path, _FILE_MODE) as lock,
            ProcessLock(folder / f"{device}.turn", _FILE_MODE) as turn,
            _NoteFile(folder / f"{device}.json") as note,
        ):
            # a process asks for the device only while it has the turn, so none finds it taken by this short look
            turn.exclusive(wait=True)
            found = {} if lock.exclusive() else note.read()
            if isinstance(pid := found.get("pid"), int):
                held.append(HeldLease(device, str(found.get("holder")), pid, str(found.get("since"))))
    return held


def lease_folder() -> Path:
    """Return the folder of this machine's leases: CAPGAP_LEASE_DIR, or one in the temporary folder, made if missing."""
    folder = Path(os.environ.get("CAPGAP_LEASE_DIR") or Path(tempfile.gettempdir()) / "capgap-leases")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(parents=True)
        # mkdir obeys the umask, so the mode is set again; an existing folder keeps the mode that its owner gave it
        folder.chmod(_FOLDER_MODE)
    return folder


def cpu_group() -> str:
    """Return the CPU group that this process was started in, as a grid's workers are; empty for none."""
    return os.environ.get(_GROUP_VARIABLE, _ALONE)


def new_cpu_group(holder: str) -> dict[str, str]:
    """Return the environment by which the processes that this one starts share the CPU among themselves alone."""
    return {_GROUP_VARIABLE: f"{holder} {os.uname().nodename} {os.getpid()} {time.monotonic_ns()}"}


def _take(stack: ExitStack, folder: Path, name: str, holder: str, wait: bool, group: str) -> None:
    try:
        lock = stack.enter_context(ProcessLock(folder / f"{name}.lock", _FILE_MODE))
        turn = stack.enter_context(ProcessLock(folder / f"{name}.turn", _FILE_MODE))
        note = stack.enter_context(_NoteFile(folder / f"{name}.json"))
    except PermissionError as error:
        raise MachineError(
            "the lease on a device cannot be asked for",
            where=error.filename,
            found=os.strerror(error.errno or 0),
            fix=f"open {folder} to every user, or name another folder in CAPGAP_LEASE_DIR, the same for all",
        ) from None
    waiting = False
    while (other := _attempt(lock, turn, note, holder, group)) is not None:
        if not wait:
            raise MachineError(
                "the device is in use",
                where=name,
                found=_holder_of(other),
                fix="wait for it to end, or leave out --no-wait",
            )
        if not waiting:
            text = f"waiting for {name}, held by {_holder_of(other)}"
            said = {key: other.get(key) for key in ("holder", "pid", "since")}
            event("lease_waiting", text, logging.INFO, device=name, **said)
        waiting = True
        time.sleep(_POLL_S)


def _attempt(lock: ProcessLock, turn: ProcessLock, note: _NoteFile, holder: str, group: str) -> _Note | None:
    """Try once to take the lease, and return None where it is taken, else the note of its holder.

    A group's first member holds the device alone while it writes the note by which the others recognize the group.
    Notes are written and read only by the process that has the turn, so none is ever seen half-written.
    """
    turn.exclusive(wait=True)
    try:
        if lock.exclusive():
            since = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
            note.write({"holder": holder, "pid": os.getpid(), "since": since, "group": group})
            if group == _ALONE or lock.shared():
                return None
        if group != _ALONE and lock.shared():
            if note.read().get("group") == group:
                return None
            lock.release()
        return note.read()
    finally:
        turn.release()


def _holder_of(note: _Note) -> str:
    try:
        return f"{note['holder']} (pid {note['pid']}, since {note['since']})"
    except KeyError:
        return "another stage"


class _NoteFile:
    """The open note beside a lock. It is written in place, because a user may not replace another user's file."""

    def __init__(self, path: Path) -> None:
        self._descriptor = open_shared(path, _FILE_MODE)

    def write(self, values: _Note) -> None:
        text = json.dumps(values).encode()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text, 0)

    def read(self) -> _Note:
        try:
            values = json.loads(os.pread(self._descriptor, 1 << 16, 0))
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def __enter__(self) -> _NoteFile:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self._descriptor)
