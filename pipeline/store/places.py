"""The places of shards: a folder on a local disk, or a URL whose shards are copied to a bounded disk cache.

path                          --LocalPlace---> the file itself
s3:// gs:// hf:// https://    --RemotePlace--> DiskCache: downloaded whole, digest checked on arrival --> the copy
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from capgap.pipeline.store.disk_cache import DiskCache
from capgap.pipeline.store.files import read_small
from capgap.pipeline.store.remote import Remote
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import FileEntry


@runtime_checkable
class ShardPlace(Protocol):
    """Opens shards by their entries in the manifest."""

    def open(self, file: FileEntry) -> IO[bytes]:
        """Open a shard's bytes as a seekable file, positioned at the start."""

    def reopens(self, file: FileEntry) -> bool:
        """Return whether a shard that was found damaged may be sound when it is opened again."""

    def name_of(self, file: FileEntry) -> str:
        """Return the name of a shard in errors."""

    def read(self, name: str) -> bytes:
        """Read a whole small file that lies next to the shards."""


class LocalPlace:
    """A folder on a local disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, file: FileEntry) -> IO[bytes]:
        """Open a shard of the folder.

        Raises:
            InputError: The shard is missing.
        """
        path = self.folder / file.path
        try:
            return _open_file(path)
        except FileNotFoundError:
            raise InputError(
                "the shard is missing", where=path, fix="rerun the stage that wrote it; the other shards are kept"
            ) from None

    def reopens(self, file: FileEntry) -> bool:
        """Return False: there is no other copy of the shard."""
        return False

    def name_of(self, file: FileEntry) -> str:
        """Return the path of a shard, which names it in errors."""
        return str(self.folder / file.path)

    def read(self, name: str) -> bytes:
        """Read a whole small file of the folder.

        Raises:
            InputError: The file is missing or too large.
        """
        try:
            return read_small(self.folder / name)
        except FileNotFoundError:
            raise _missing(self.folder / name) from None


class RemotePlace:
    """A folder behind a URL, whose shards are read through a disk cache.

    Args:
        url: URL of the folder.
        cache: Disk cache of the copies.
    """

    def __init__(self, url: str, cache: DiskCache) -> None:
        self.url, self._cache = url.rstrip("/"), cache
        self._remote = Remote(self.url)

    def open(self, file: FileEntry) -> IO[bytes]:
        """Open the local copy of a shard, and download the shard first if there is no copy.

        Raises:
            CorruptError: The downloaded file is not the one that the manifest lists.
            InputError: The shard cannot be downloaded.
        """
        return self._cache.open(file, lambda: self._remote.stream(file.path), self.name_of(file))

    def reopens(self, file: FileEntry) -> bool:
        """Return True, and delete the local copy if the local disk has damaged it: the shard is downloaded again."""
        self._cache.drop_damaged(file)
        return True

    def name_of(self, file: FileEntry) -> str:
        """Return the URL of a shard, which names it in errors."""
        return f"{self.url}/{file.path}"

    def read(self, name: str) -> bytes:
        """Read a whole small file behind the URL; the caller must check its digest.

        Raises:
            InputError: The file is missing or cannot be read.
        """
        data = self._remote.read(name)
        if data is None:
            raise _missing(f"{self.url}/{name}")
        return data


def place_of(folder: Path | str, cache: DiskCache | None = None) -> ShardPlace:
    """Return the place that a path or URL names; the shards of a URL are read through `cache` or the default cache."""
    if isinstance(folder, str) and is_url(folder):
        return RemotePlace(folder, cache or DiskCache.default())
    return LocalPlace(Path(folder))


def _open_file(path: Path) -> IO[bytes]:
    """Open a regular file; pipes and devices are refused because reading them may never end."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.open("rb")


def _missing(where: Path | str) -> InputError:
    return InputError(
        "a file that the shards cannot be read without is missing", where=where, fix="rerun the stage that wrote it"
    )


def is_url(location: Path | str) -> bool:
    """Return whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location
