"""Copies of remote files on a local disk, bounded in bytes, shared safely by threads, processes and ranks.

    open --lock of the digest--> present -> opened
                                 absent  -> room made, downloaded under another name, digest checked, renamed -> opened

A copy is named after its digest and gets this name only when it is complete and checked, whichever process fetched it.
A process that has a copy open can keep reading it even if another process deletes it to make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from capgap.pipeline.store.files import sha256_of, sync_folder
from capgap.pipeline.store.locks import ProcessLock, held_alone
from capgap.schemas.errors import CorruptError, InputError, SettingError
from capgap.schemas.manifest import FileEntry

FOLDER_VARIABLE = "CAPGAP_DOWNLOADS"
SIZE_VARIABLE = "CAPGAP_DOWNLOADS_GB"
_DEFAULT_GB = 50.0
_PARTIAL = ".partial"


class DiskCache:
    """Keeps copies of the most recently used files, up to a number of bytes.

    Args:
        folder: Folder of the copies; created if it does not exist.
        max_bytes: Largest size of all copies, including unfinished downloads. Simultaneous downloads that are together
            larger than this exceed it rather than wait for each other.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    @classmethod
    def default(cls) -> DiskCache:
        """Return the cache in the folder CAPGAP_DOWNLOADS (default `~/.cache/capgap`).

        Its size in gigabytes is CAPGAP_DOWNLOADS_GB (default 50).

        Raises:
            SettingError: The size is not a number above 0.
        """
        given = os.environ.get(SIZE_VARIABLE, _DEFAULT_GB)
        try:
            size_gb = float(given)
            if not 0 < size_gb < float("inf"):
                raise ValueError
        except ValueError:
            raise SettingError("not a size", where=SIZE_VARIABLE, found=given, expected="gigabytes, above 0") from None
        folder = os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "capgap"
        return cls(Path(folder), int(size_gb * 1e9))

    def open(self, file: FileEntry, download: Callable[[], Iterable[bytes]], where: str) -> IO[bytes]:
        """Open the copy of a file, and download the file first if there is no copy.

        Args:
            file: Entry with the file's size and digest, which identify the copy.
            download: Returns the file's bytes in pieces, from the beginning.
            where: Name of the file in errors.

        Raises:
            CorruptError: Two downloads both differ from the entry.
            InputError: The file is larger than the cache may be.
        """
        path = self._folder / file.sha256
        try:
            return _opened(path)
        except FileNotFoundError:
            pass
        with held_alone(self._lock_of(file.sha256)):
            try:
                return _opened(path)
            except FileNotFoundError:
                return self._fetch(file, path, download, where)

    def drop_damaged(self, file: FileEntry) -> None:
        """Delete the copy of a file if it is no longer what arrived, so that the next `open` downloads it again."""
        path = self._folder / file.sha256
        with held_alone(self._lock_of(file.sha256)), contextlib.suppress(FileNotFoundError):
            # another process may have replaced the copy already
            if sha256_of(path) != file.sha256:
                with self._room():
                    path.unlink()

    def _fetch(self, file: FileEntry, path: Path, download: Callable[[], Iterable[bytes]], where: str) -> IO[bytes]:
        if file.num_bytes > self._max_bytes:
            raise InputError(
                "the shard is larger than the disk cache may be",
                where=where,
                found=f"{file.num_bytes:,} bytes",
                expected=f"at most {self._max_bytes:,}",
                fix=f"set {SIZE_VARIABLE} to more gigabytes",
            )
        partial = path.with_name(path.name + _PARTIAL)
        with self._room():
            partial.unlink(missing_ok=True)  # a killed download may have left this file
            self._make_room(file.num_bytes)
            with partial.open("wb") as reserved:
                reserved.truncate(file.num_bytes)  # sparse, but of full size, so that other processes count it
        try:
            found = _write(partial, download, file.num_bytes)
            if found != (file.num_bytes, file.sha256):
                # try once more: a broken connection is more common than a file that is damaged at its source
                found = _write(partial, download, file.num_bytes)
            if found != (file.num_bytes, file.sha256):
                raise CorruptError(
                    "not the file that the manifest lists",
                    where=where,
                    found=f"{found[0]} bytes with sha256 {found[1][:12]}",
                    expected=f"{file.num_bytes} bytes with {file.sha256[:12]}",
                    fix="upload the whole folder of the stage again",
                )
            arrived = partial.open("rb")  # opened before the rename, after which others may delete it to make room
            with self._room():
                partial.replace(path)
            sync_folder(self._folder)
            return arrived
        finally:
            with self._room():
                partial.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used copies and abandoned downloads until `num_bytes` are free."""
        entries = []
        for path in self._folder.iterdir():
            if path.is_file():
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        used = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if used + num_bytes <= self._max_bytes:
                return
            if path.suffix != _PARTIAL or self._is_abandoned(path):
                path.unlink(missing_ok=True)
                used -= size

    def _is_abandoned(self, partial: Path) -> bool:
        with ProcessLock(self._lock_of(partial.stem)) as lock:
            return lock.exclusive()

    def _room(self) -> AbstractContextManager[None]:
        """Lock the set of files in the folder, so that only one process changes it at a time."""
        return held_alone(self._folder / "locks" / "room")

    def _lock_of(self, digest: str) -> Path:
        # 4096 locks serve any number of files; files that share a lock only have to wait for each other
        return self._folder / "locks" / digest[:3]


def _opened(path: Path) -> IO[bytes]:
    file = path.open("rb")
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))  # marks the copy as just used
    return file


def _write(path: Path, download: Callable[[], Iterable[bytes]], expected_bytes: int) -> tuple[int, str]:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("r+b") as file:
        for chunk in download():
            num_bytes += len(chunk)
            if num_bytes > expected_bytes:
                break  # the size is wrong already, and no more room was made than the expected bytes
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes, digest.hexdigest()
