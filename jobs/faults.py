"""The exit codes, and the translation of Python's and other packages' exceptions into errors for the user.

0 success, 1 a bug in capgap, 2 an error that the user can correct, 3 a fault of the machine, 4 damaged data, 5 some
runs of a grid have no result, 130 interrupted, 141 nobody reads the output, 128 + n a stage was killed by signal n.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from capgap.schemas.errors import CapgapError, MachineError

CRASHED = 1
INCOMPLETE = 5
READER_GONE = 141
INTERRUPTED = 130

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# names no flag, because commands differ: `--out` for most, `--to` for one, a folder's name for others
_ELSEWHERE = "let the command write to another folder"
_NO_WRITING = (errno.EROFS, errno.EACCES)


def named(error: Exception) -> CapgapError | None:
    """Return the error as one that a user understands; None for an unexpected one, which is a bug."""
    if isinstance(error, CapgapError):
        return error
    # tokenizers and safetensors write files in Rust, and report a full disk as an exception of their own
    if "(os error 28)" in str(error):
        return _of_the_disk(OSError(errno.ENOSPC, "no space"))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] != "capgap":
        return MachineError(
            "a package is not installed",
            where=error.name,
            fix="install capgap with the extra that needs it; CONTRIBUTING.md and pyproject.toml name them",
        )
    if _is_of_memory(error):
        return MachineError(
            "memory has run out",
            found=(str(error) or type(error).__name__).splitlines()[0],
            fix="lower train.micro_batch_sequences, eval.batch_sequences, benchmarks.batch_sequences or "
            "cache.chunk_rows, whichever stage it was",
        )
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
        return MachineError(
            "the network fails", found=str(error) or type(error).__name__, fix="run the same command again"
        )
    if isinstance(error, OSError) and error.errno in (*_NO_SPACE, *_NO_WRITING):
        return _of_the_disk(error)
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)) and error.filename is not None:
        what = "a folder stands where a file belongs"
        if not isinstance(error, IsADirectoryError):
            what = "something else stands where a folder belongs"
        return CapgapError(
            what, where=error.filename2 or error.filename, fix="move it away and run the same command again"
        )
    return None


def _has_no_inode(where: str) -> bool:
    """Return whether the file system of a path, which need not exist, has no free inode."""
    for folder in Path(where).absolute().parents:
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            return found.f_files > 0 and found.f_ffree == 0
    return False


def _is_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. torch's exception is recognised by its name, to avoid importing torch here."""
    by_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or by_torch


def _of_the_disk(error: OSError) -> MachineError:
    where = error.filename or "the output folder"
    if error.errno in _NO_WRITING:
        return MachineError("cannot be written", where=where, found=os.strerror(error.errno or 0), fix=_ELSEWHERE)
    if error.errno == errno.ENOSPC and _has_no_inode(where):
        return MachineError(
            "no file can be made any more",
            where=where,
            found="a file system that has space, and no inode left",
            fix=f"remove files that you do not need and run the same command again, or {_ELSEWHERE}",
        )
    return MachineError(
        "no space is left to write to",
        where=where,
        found=os.strerror(error.errno or 0),
        fix="free some space and run the same command again; finished shards are kept",
    )
