"""An exclusive or shared lock of the operating system on a file; it is released when its process ends.

On a network file system, the lock holds across machines if the file system forwards `flock`, as NFS since version 4,
Lustre with `flock`, BeeGFS and CephFS do. capgap refuses a file system that has no locks at all.
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
    """Open a file that processes, perhaps of several users, share, and return its descriptor; create it if necessary.

    This is safe in a folder that anyone may write to. A symbolic link is refused, so that nobody can redirect this
    process to another file. A file of another user can be opened, which a plain `O_CREAT` may not do there
    (`fs.protected_regular` of Linux).

    Raises:
        FileNotFoundError: The folder does not exist.
        PermissionError: The file belongs to another user who does not share it.
        MachineError: A symbolic link stands in the place of the file.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    while True:
        try:
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, flags)
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
                # the process's umask may have removed bits of the mode
                os.fchmod(descriptor, mode)
                return descriptor
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise MachineError("a link stands where a lock belongs", where=path, fix="remove it") from None


@contextlib.contextmanager
def held_alone(path: Path) -> Iterator[None]:
    """Wait for the exclusive lock on a file, and hold it while the block runs.

    Raises:
        FileNotFoundError, PermissionError, MachineError: The file cannot be opened, as `open_shared` describes, or its
            file system has no locks.
    """
    with ProcessLock(path) as lock:
        lock.exclusive(wait=True)
        yield


class ProcessLock:
    """An open lock file; the lock is not held until `exclusive` or `shared` is called.

    Args:
        path: Lock file. It is created if necessary, and never removed, because other processes may have it open.
        mode: Permission bits of the file if it is created.

    Raises:
        FileNotFoundError, PermissionError, MachineError: The file cannot be opened, as `open_shared` describes.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._path = path
        self._descriptor = open_shared(path, mode)

    def exclusive(self, *, wait: bool = False) -> bool:
        """Take the exclusive lock, and return whether it is held. On failure, a lock held before may be lost."""
        return self._lock(fcntl.LOCK_EX, wait)

    def shared(self, *, wait: bool = False) -> bool:
        """Take the shared lock, and return whether it is held. On failure, a lock held before may be lost."""
        return self._lock(fcntl.LOCK_SH, wait)

    def release(self) -> None:
        """Release the lock; it can be taken again."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release the lock and close the file."""
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
