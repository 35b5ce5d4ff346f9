"""Which exit code a fault has, and which faults that no stage has named are the machine's.

0 done, 1 a fault of ours, 2 the user's to mend, 3 the machine's, 4 damaged data, 5 a grid was gone through and some of
its runs have no result, 130 interrupted, 128 + n where a stage was killed by signal n.
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
# as a command says it: `--out` of most, `--to` of one, a folder's name of others
_ELSEWHERE = "let the command write to another folder"
_NO_WRITING = (errno.EROFS, errno.EACCES)


def named(error: Exception) -> CapgapError | None:
    """The error in the user's words; None for what nobody expected."""
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
    """Whether the file system of a path, which may not exist, has a table of inodes that is full."""
    for folder in Path(where).absolute().parents:
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            return found.f_files > 0 and found.f_ffree == 0
    return False


def _is_of_memory(error: Exception) -> bool:
    """torch's own class is known by its name: torch is not imported to tell an error."""
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
