"""Opens files on this machine and files behind a URL, which are read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from capgap.pipeline.corpus.kinds import Place
from capgap.pipeline.store.remote import client_errors, client_of
from capgap.schemas.errors import InputError

# Bytes per request: large enough that the latency of a request is small beside its transfer.
_BLOCK_BYTES = 8 << 20
# The names under which clients report a value that changes whenever the file does.
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "blob_id", "Content-MD5")


@contextmanager
def open_place(place: Place) -> Iterator[BinaryIO]:
    """Open a file for reading bytes; seeking in a remote file works if its server allows it.

    Raises:
        OSError: a file on this machine cannot be read.
        InputError, MachineError: the URL cannot be read.
    """
    if isinstance(place, Path):
        with place.open("rb") as file:
            yield file
        return
    stream: BinaryIO
    try:
        with (
            client_errors(place),
            client_of(place, "text is not read").open(place, "rb", block_size=_BLOCK_BYTES) as stream,
        ):
            yield stream
    except FileNotFoundError:
        raise _gone(place) from None


def state_of(place: Place, fresh: bool = False) -> tuple[int, str]:
    """Return the size of a file in bytes, and its version: a modification time or tag that changes when the file does.

    Args:
        place: path or URL of the file.
        fresh: ask the server again, even if this process has asked before.

    Raises:
        InputError: the file does not exist, or its server does not say how large it is.
        MachineError: the client for the URL is not installed.
    """
    if isinstance(place, Path):
        try:
            found = place.stat()
        except OSError:
            raise _gone(place) from None
        return found.st_size, str(found.st_mtime_ns)
    try:
        with client_errors(place):
            client = client_of(place, "text is not read")
            if fresh:
                client.invalidate_cache()
            return _state(place, client.info(place))
    except FileNotFoundError:
        raise _gone(place) from None


def places_of_url(url: str) -> list[str]:
    """Return the files that a URL names, sorted: the file itself, those below a folder, or those that match a pattern.

    Raises:
        InputError, MachineError: the URL cannot be read.
    """
    client = client_of(url, "text is not read")
    with client_errors(url):
        try:
            if "*" in url:
                return [str(client.unstrip_protocol(name)) for name in sorted(client.glob(url))]
            if client.isdir(url) and not client.isfile(url):
                return [str(client.unstrip_protocol(name)) for name in sorted(client.find(url))]
            return [url] if client.exists(url) else []
        except FileNotFoundError:
            return []


def _state(url: str, info: dict[str, object]) -> tuple[int, str]:
    size = info.get("size")
    if not isinstance(size, int):
        raise InputError("the server does not say how large the file is", where=url, fix="download it")
    return size, next((str(info[name]) for name in _VERSIONS if info.get(name)), "")


def _gone(place: Place) -> InputError:
    return InputError("the file is gone", where=place, expected="the file as it was listed", fix="restore it")
