"""A lock of the operating system on a file, held by one process alone or shared; it ends with the process.

`filelock`, which locks for one process alone, takes the very same kind of lock: the two exclude one another. On a
network file system it holds across machines where that system passes `flock` on, as NFS since version 4, Lustre with
`flock`, BeeGFS and CephFS do; capgap refuses one that has no locks at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Self

from capgap.schemas.errors import MachineError

_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class ProcessLock:
    """One lock file, opened; nothing is held at first.

    Args:
        path: made where it is not there, and never removed: others may have it open.
        mode: of the file, if it is made here.

    Raises:
        FileNotFoundError: its folder does not exist.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        # the process's umask took its share; another user's file keeps its own mode
        with contextlib.suppress(PermissionError):
            os.fchmod(self._descriptor, mode)

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
