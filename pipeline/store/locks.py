"""A lock of the operating system on a file, held by one process alone or shared; it ends with the process.

On a network file system it holds across machines where that system passes `flock` on, as NFS since version 4, Lustre
with `flock`, BeeGFS and CephFS do; capgap refuses one that has no locks at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from capgap.schemas.errors import MachineError

_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def open_shared(path: Path, mode: int) -> int:
    """A descriptor of a file that processes share, perhaps those of several users; made where it is not there.

    In a folder that is open to all, nobody can lead this process to another file by a link, nor is a file of another
    user in the way, as it would be to a plain `O_CREAT` there (`fs.protected_regular` of Linux).

    Raises:
        FileNotFoundError: its folder does not exist.
        PermissionError: it belongs to another user who keeps it.
        MachineError: a link stands in its place.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags)
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
                # the process's umask took its share
                os.fchmod(descriptor, mode)
                return descriptor
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise MachineError("a link stands where a lock belongs", where=path, fix="remove it") from None


@contextlib.contextmanager
def held_alone(path: Path) -> Iterator[None]:
    """Wait for the lock on a file, and hold it alone while the block runs.

    Raises:
        FileNotFoundError, PermissionError, MachineError: as `ProcessLock`.
    """
    with ProcessLock(path) as lock:
        lock.exclusive(wait=True)
        yield


class ProcessLock:
    """One lock file, opened; nothing is held at first.

    Args:
        path: made where it is not there, and never removed: others may have it open.
        mode: of the file, if it is made here.

    Raises:
        FileNotFoundError, PermissionError, MachineError: as `open_shared`.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._path = path
        self._descriptor = open_shared(path, mode)

    def exclusive(self, *, wait: bool = False) -> bool:
        """Hold it alone; whether that is so. What was held before may be lost where it is not."""
        return self._lock(fcntl.LOCK_EX, wait)

    def shared(self, *, wait: bool = False) -> bool:
        """Hold it with others; whether that is so. What was held before may be lost where it is not."""
        return self._lock(fcntl.LOCK_SH, wait)

    def release(self) -> None:
        """Hold nothing any more; it can be taken again."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release it and close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _lock(self, kind: int, wait: bool) -> bool:
        try:
            fcntl.flock(self._descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                return False
            if error.errno in _NO_LOCKS:
                raise MachineError(
                    "this file system has no locks",
                    where=self._path,
                    found=os.strerror(error.errno),
                    fix="choose a folder on one that has, and mount it with its locks on",
                ) from None
            raise
        return True
