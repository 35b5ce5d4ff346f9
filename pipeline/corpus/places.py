"""Files wherever they lie: on this machine, or behind a URL, from where they are read in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from capgap.pipeline.corpus.kinds import Place
from capgap.pipeline.store.remote import client_errors, client_of
from capgap.schemas.errors import InputError

# What is asked for at a time: a request's latency is small beside its transfer.
_BLOCK_BYTES = 8 << 20
# How clients call what changes when a file does.
_VERSIONS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "blob_id", "Content-MD5")


@contextmanager
def open_place(place: Place) -> Iterator[BinaryIO]:
    """The bytes of a file, which can be read from any place in it where its server allows it.

    Raises:
        OSError: a file of this machine cannot be read.
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
    """Size of a file in bytes, and what changes when the file does: a time, or a tag.

    `fresh` asks the server again for what this process has heard before.

    Raises:
        InputError: it is not there, or its server does not say how large it is.
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
    """The files that a URL names: itself, those below it, or those that match it; sorted.

    Raises:
        InputError, MachineError: it cannot be read.
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
