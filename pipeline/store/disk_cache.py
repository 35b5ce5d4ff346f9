"""Copies of remote files on a local disk, bounded in bytes, shared safely by threads, processes and ranks.

    open --lock of the digest--> there? -> opened
                                 no     -> room made, downloaded under another name, digest checked, renamed -> opened

A file is named after its digest, so a copy under its name is whole and right, whoever fetched it. Whoever has a copy
open keeps reading it even if another process makes room by deleting it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from capgap.pipeline.store.files import sync_folder
from capgap.pipeline.store.locks import ProcessLock, held_alone
from capgap.schemas.errors import CorruptError, InputError, SettingError
from capgap.schemas.manifest import FileEntry

FOLDER_VARIABLE = "CAPGAP_DOWNLOADS"
SIZE_VARIABLE = "CAPGAP_DOWNLOADS_GB"
_DEFAULT_GB = 50.0
_PARTIAL = ".partial"


class DiskCache:
    """The files used last, up to a number of bytes.

    Args:
        folder: holds the copies; made where it is not there.
        max_bytes: of all copies, those being downloaded included; downloads at the same time that are together larger
            than this pass it, rather than wait for each other.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        (folder / "locks").mkdir(parents=True, exist_ok=True)

    @classmethod
    def default(cls) -> DiskCache:
        """The one that CAPGAP_DOWNLOADS (a folder) and CAPGAP_DOWNLOADS_GB name; `~/.cache/capgap`, 50 GB.

        Raises:
            SettingError: the size is not a number above 0.
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
        """The copy of a file, fetched first where it is not there.

        Args:
            file: size and digest, by which the copy is known.
            download: the file's bytes in pieces, from the first on.
            where: names the file in errors.

        Raises:
            CorruptError: what arrived, twice, is not what the entry says.
            InputError: the file is larger than the cache may be.
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
            partial.unlink(missing_ok=True)  # a killed download left it
            self._make_room(file.num_bytes)
            with partial.open("wb") as reserved:
                reserved.truncate(file.num_bytes)  # a sparse file of the full size: others count it
        try:
            found = _write(partial, download, file.num_bytes)
            if found != (file.num_bytes, file.sha256):
                # once more: a connection that broke is commoner than a file that is damaged at its source
                found = _write(partial, download, file.num_bytes)
            if found != (file.num_bytes, file.sha256):
                raise CorruptError(
                    "not the file that the manifest lists",
                    where=where,
                    found=f"{found[0]} bytes with sha256 {found[1][:12]}",
                    expected=f"{file.num_bytes} bytes with {file.sha256[:12]}",
                    fix="upload the whole folder of the stage again",
                )
            arrived = partial.open("rb")  # before it has its name, and may be deleted to make room
            with self._room():
                partial.replace(path)
            sync_folder(self._folder)
            return arrived
        finally:
            with self._room():
                partial.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int) -> None:
        """Delete the copies used longest ago, and what killed downloads left, until so many bytes are free."""
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
        """Whoever holds it may change which files there are."""
        return held_alone(self._folder / "locks" / "room")

    def _lock_of(self, digest: str) -> Path:
        # 4096 locks for any number of files; files that share one wait for each other, no more
        return self._folder / "locks" / digest[:3]


def _opened(path: Path) -> IO[bytes]:
    file = path.open("rb")
    now = time.time_ns()
    os.utime(file.fileno(), ns=(now, now))  # used just now
    return file


def _write(path: Path, download: Callable[[], Iterable[bytes]], expected_bytes: int) -> tuple[int, str]:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("r+b") as file:
        for chunk in download():
            num_bytes += len(chunk)
            if num_bytes > expected_bytes:
                break  # it has another size for certain; nothing past the room that was made is written
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes, digest.hexdigest()
