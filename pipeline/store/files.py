"""Files and folders that are written atomically (temporary name, fsync, rename), and their digests."""

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

# A manifest with a million members has 40 MB, and the ranking of a vocabulary of 16 million ids has 64 MiB.
MAX_SMALL_BYTES = 256 << 20


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that appears under `path` only if the block ends without an error."""
    temporary, file = _begin(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # renamed while it is locked, so that no other process removes it as the leftover of a killed writer
            temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a small file atomically, and remove the partial files that killed writers of it left behind."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    _remove_left(path, TEMP_MARK)


@contextmanager
def own_file(path: Path, data: bytes | str) -> Iterator[Path]:
    """Make a small file next to `path` that exists while the block runs; no other process writes or removes it.

    The next call on the same machine removes a file that a killed process left. A file of another machine is never
    removed, because a lock may not be visible across machines and its process may be alive.
    """
    mark = f"{_OWN_MARK}{os.uname().nodename}-"
    _remove_left(path, mark)
    own, file = _begin(path, mark)
    try:
        # the file stays open and locked to the end, which shows other processes that its owner is alive
        with file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            yield own
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Make a folder that appears under `path` only if the block ends without an error, and replaces a folder there.

    It is for files that a library writes one by one, some under names of its own: a kill leaves no partial folder
    under `path`. Where a folder is replaced, a kill just before the renaming leaves none.
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
    """Remove the files with this mark that killed processes left next to `path`."""
    for one in path.parent.glob(f"{glob.escape(path.name + mark)}*"):
        # if the file cannot be opened or locked, its process is alive or has just removed it
        with contextlib.suppress(OSError), one.open("r+b") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            one.unlink()


def _begin(path: Path, mark: str = TEMP_MARK) -> tuple[Path, IO[bytes]]:
    """Create a file next to `path` that stays locked while its writer lives, if the file system has locks."""
    while True:
        temporary = path.with_name(f"{path.name}{mark}{uuid.uuid4().hex[:12]}")
        file = temporary.open("xb")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return temporary, file
        # another process removed it as a leftover before it was locked, so a new one is made
        file.close()


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk, even if another process wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until creations, renamings and removals in `folder` are on the disk, and so survive a power failure."""
    sync_file(folder)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file at any depth; links to folders are followed, and no folder is entered twice."""
    entered = set()
    for at, inner, names in os.walk(folder, followlinks=True):
        status = os.stat(at)  # noqa: PTH116  # `at` is a str, not a Path
        if (status.st_dev, status.st_ino) in entered:
            inner.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        yield from (Path(at, name) for name in names)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_small(path: Path) -> bytes:
    """Read a whole small file from a local disk.

    Raises:
        FileNotFoundError: There is no such path, or it is a folder, a pipe or a device.
        InputError: The file is larger than 256 MiB.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    with path.open("rb") as file:
        data = file.read(MAX_SMALL_BYTES + 1)
    if len(data) > MAX_SMALL_BYTES:
        raise too_large(path)
    return data


def too_large(where: Path | str) -> InputError:
    """Return the error for a file that should be small but is too large."""
    return InputError(
        "larger than any manifest, ranking or other small file of a folder",
        where=where,
        found=f"over {MAX_SMALL_BYTES >> 20} MiB",
        fix="do not use this folder",
    )


class HashingWriter:
    """A wrapper of a binary file that computes the digest of what is written to it; it cannot seek."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        """Write the data, add it to the digest, and return the number of bytes written."""
        self._digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 digest of the bytes written so far, hexadecimal."""
        return self._digest.hexdigest()
