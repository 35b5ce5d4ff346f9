"""Files and folders that are either whole or not there: temporary name, fsync, rename; and their digests."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from capgap.schemas.errors import InputError

TEMP_MARK = ".partial-"
_OWN_MARK = ".own-"

# A manifest's million members are 40 MB, the ranking of a vocabulary of 16 million 64 MiB.
MAX_SMALL_BYTES = 256 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` only when the block ends without an error."""
    temporary, file = _begin(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # still locked, so that nobody takes it for one that a kill left
            temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a whole small file, and remove what killed writers of the same file left half-written."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    _remove_left(path, TEMP_MARK)


@contextmanager
def own_file(path: Path, data: bytes | str) -> Iterator[Path]:
    """A whole small file beside `path` for as long as the block runs, which no other process writes to or removes.

    One that a killed process of this machine left goes with the next. Locks of two machines may not meet, so that one
    of another machine is never taken for such.
    """
    mark = f"{_OWN_MARK}{os.uname().nodename}-"
    _remove_left(path, mark)
    own, file = _begin(path, mark)
    try:
        # open, and so locked, to the end: that is how others know that its process lives
        with file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            yield own
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that stands under `path` only when the block ends without an error, in place of one that was there.

    For what a library writes file by file, some of them under names of its own: a kill leaves no half of it.
    """
    temporary = path.with_name(f"{path.name}{TEMP_MARK}{uuid.uuid4().hex[:12]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for one in sorted(temporary.rglob("*"), reverse=True):
            sync_file(one)
        sync_folder(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_left(path: Path, mark: str) -> None:
    """Remove what killed processes left beside `path`."""
    for one in path.parent.glob(f"{glob.escape(path.name + mark)}*"):
        # where it is not to be had, it belongs to a process that lives, or has just gone
        with contextlib.suppress(OSError), one.open("r+b") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            one.unlink()


def _begin(path: Path, mark: str = TEMP_MARK) -> tuple[Path, IO[bytes]]:
    """A new file beside `path`, locked as long as its writer lives, where the file system has locks."""
    while True:
        temporary = path.with_name(f"{path.name}{mark}{uuid.uuid4().hex[:12]}")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        # somebody took it for one that a kill left, before it was locked
        file.close()


def sync_file(path: Path) -> None:
    """Wait until the disk has a file's bytes, whoever wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed and removed in `folder` survive a power failure."""
    sync_file(folder)


def files_below(folder: Path) -> Iterator[Path]:
    """Every file at any depth; links to folders are followed, and each folder is entered once, whatever leads to it."""
    entered = set()
    for at, inner, names in os.walk(folder, followlinks=True):
        status = os.stat(at)  # noqa: PTH116  # a text already
        if (status.st_dev, status.st_ino) in entered:
            inner.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        yield from (Path(at, name) for name in names)


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path) -> bytes:
    """A small file of a local disk as a whole.

    Raises:
        FileNotFoundError: it is not there, or no file but a folder, a pipe or a device.
        InputError: it is too large.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        data = file.read(MAX_SMALL_BYTES + 1)
    if len(data) > MAX_SMALL_BYTES:
        raise too_large(path)
    return data


def too_large(where: Path | str) -> InputError:
    """What is said of a file that should be small and is not."""
    return InputError(
        "larger than any manifest", where=where, found=f"over {MAX_SMALL_BYTES >> 20} MiB", fix="do not use this folder"
    )


class HashingWriter:
    """A binary file that also digests what is written to it; it cannot seek."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        """Write and digest."""
        self._digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        """Digest so far, hexadecimal."""
        return self._digest.hexdigest()
