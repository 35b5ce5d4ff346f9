"""Where shards lie: a folder on a local disk, or a URL whose shards pass through a bounded disk cache.

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
        """The shard's bytes, from the first on, seekable."""

    def name_of(self, file: FileEntry) -> str:
        """The shard as errors name it."""

    def read(self, name: str) -> bytes:
        """A small file beside the shards, as a whole."""


class LocalPlace:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, file: FileEntry) -> IO[bytes]:
        """The file in the folder.

        Raises:
            InputError: it is missing.
        """
        path = self.folder / file.path
        try:
            return _open_file(path)
        except FileNotFoundError:
            raise InputError(
                "the shard is missing", where=path, fix="rerun the stage that wrote it; the other shards are kept"
            ) from None

    def name_of(self, file: FileEntry) -> str:
        """Its path."""
        return str(self.folder / file.path)

    def read(self, name: str) -> bytes:
        """The file in the folder.

        Raises:
            InputError: it is missing.
        """
        try:
            return read_small(self.folder / name)
        except FileNotFoundError:
            raise _missing(self.folder / name) from None


class RemotePlace:
    """A folder behind a URL, through a disk cache.

    Args:
        url: of the folder.
        cache: holds the copies.
    """

    def __init__(self, url: str, cache: DiskCache) -> None:
        self.url, self._cache = url.rstrip("/"), cache
        self._remote = Remote(self.url)

    def open(self, file: FileEntry) -> IO[bytes]:
        """The local copy, fetched first where it is not there.

        Raises:
            CorruptError: what arrived is not what the manifest lists.
            InputError: it cannot be fetched.
        """
        return self._cache.open(file, lambda: self._remote.stream(file.path), self.name_of(file))

    def name_of(self, file: FileEntry) -> str:
        """Its URL."""
        return f"{self.url}/{file.path}"

    def read(self, name: str) -> bytes:
        """The file behind the URL; what it must be is checked by whoever asked.

        Raises:
            InputError: it is missing or cannot be read.
        """
        data = self._remote.read(name)
        if data is None:
            raise _missing(f"{self.url}/{name}")
        return data


def place_of(folder: Path | str, cache: DiskCache | None = None) -> ShardPlace:
    """The place that a path or URL names; a URL's shards pass through `cache`, or the default one."""
    if isinstance(folder, str) and is_url(folder):
        return RemotePlace(folder, cache or DiskCache.default())
    return LocalPlace(Path(folder))


def _open_file(path: Path) -> IO[bytes]:
    """A file, and neither a pipe nor a device, which could be read for ever."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.open("rb")


def _missing(where: Path | str) -> InputError:
    return InputError(
        "a file that the shards cannot be read without is missing", where=where, fix="rerun the stage that wrote it"
    )


def is_url(location: Path | str) -> bool:
    """Whether it is a URL rather than a path."""
    return isinstance(location, str) and "://" in location
