"""Manifests and work orders of stage folders: how they are read, and compared with what was written."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.stage.identity import seal_of
from capgap.pipeline.store import Remote, is_url
from capgap.pipeline.store.files import read_small, sha256_of
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.facts import CacheFacts
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME, Manifest, SourceEntry, WorkOrder

Finished = tuple[Path | str, Manifest]
"""Folder, or URL, and manifest of a finished stage."""


@contextmanager
def no_collection() -> Iterator[None]:
    """Do not look for cyclic garbage while the block runs.

    The objects of a large manifest hold no cycles, and looking for them again and again takes half of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_KNOWN: ContextVar[dict[str, Manifest | None] | None] = ContextVar("_KNOWN", default=None)


@contextmanager
def each_manifest_once() -> Iterator[None]:
    """Let `read_manifest` read each manifest once within the block; one that is written meanwhile is not seen.

    It is for commands that look at many runs which share folders, and write nothing meanwhile.
    """
    outer = _KNOWN.get()
    token = _KNOWN.set({} if outer is None else outer)
    try:
        yield
    finally:
        _KNOWN.reset(token)


def read_manifest(folder: Path | str) -> Manifest | None:
    """Return the manifest of a finished folder, given by path or URL; None where there is none.

    Raises:
        CorruptError: The manifest cannot be understood.
        InputError, MachineError: The URL cannot be read.
    """
    known = _KNOWN.get()
    if known is None:
        return _read_manifest(folder)
    if str(folder) not in known:
        known[str(folder)] = _read_manifest(folder)
    return known[str(folder)]


def require_seal(folder: Path | str, manifest: Manifest) -> None:
    """Raise CorruptError if the manifest differs from what was written when its stage was finished."""
    try:
        with no_collection():
            seal = seal_of(manifest)
    except ValueError as error:  # a number that no stage writes: not a number, or one of thousands of digits
        seal = str(error)
    if manifest.seal != seal:
        raise CorruptError(
            "the manifest is not what was written",
            where=f"{folder}/{MANIFEST_NAME}",
            found=f"a digest of {seal[:12]}",
            expected=f"its seal, {manifest.seal[:12] or 'none'}",
            fix="delete this file and run the same command again",
        )


def read_work_order(folder: Path) -> WorkOrder | None:
    """Return the work order of an unfinished folder; None where there is none, or where it cannot be read."""
    try:
        return WorkOrder.model_validate_json((folder / WORK_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def finished_stage(stage: str, folder: str, what: str, where: str, expected: str) -> Finished:
    """Return the location and manifest of a finished stage, given by folder or URL, without checking its seal.

    Args:
        stage: Name of the stage that must be there.
        folder: Path or URL.
        what: First part of the error message where the stage is not there.
        where: Value of the error's `where`.
        expected: Value of the error's `expected`.

    Raises:
        InputError: The folder holds no finished stage, or another one; or the URL cannot be read.
        CorruptError: The manifest cannot be understood.
        MachineError: The URL cannot be read.
    """
    location = folder.rstrip("/") if is_url(folder) else Path(folder)
    manifest = read_manifest(location)
    if manifest is None or stage not in (manifest.stage, manifest.read_as):
        found = "no manifest.json" if manifest is None else f"a finished {manifest.stage} stage"
        raise InputError(what, where=where, found=found, expected=expected)
    return location, manifest


def finished_cache(location: Path | str, what: str = "no finished cache") -> Finished:
    """Return the location and manifest of a finished cache, given by folder or URL, after a check of its seal.

    Args:
        location: Path or URL.
        what: First part of the error message where no cache is there.

    Raises:
        InputError: The folder holds no finished stage, or another one.
        CorruptError: The manifest differs from what was written when the cache was finished.
        MachineError: The URL cannot be read.
    """
    expected = "the folder of a finished cache, for example runs/demo/cache, or its URL"
    place, manifest = finished_stage("cache", str(location), what, str(location), expected)
    require_seal(place, manifest)
    return place, manifest


def require_of_tokens(facts: CacheFacts, location: Path | str, what: str) -> None:
    """Raise InputError for a cache that `align` made, which holds chunks instead of distributions after tokens."""
    if facts.aligned is not None:
        raise InputError(
            what,
            where=str(location),
            found="an aligned cache, of chunks of text",
            expected="a cache of the teacher's own tokens",
            fix="name the cache that it was made of",
        )


def record_sources(
    paths: Iterable[Path], known: Iterable[SourceEntry] = (), digests: bool = True
) -> tuple[SourceEntry, ...]:
    """Return path, size, time of change and sha256 of each file, as they are now.

    Args:
        paths: The files.
        known: Earlier entries; the digest of a file whose size and time are still those of its entry is taken from it.
        digests: Whether to compute the other digests; without, they are empty.
    """
    earlier = {entry.path: entry for entry in known}
    entries = []
    for path in paths:
        before, entry = path.stat(), earlier.get(str(path))
        if entry is None or (entry.num_bytes, entry.modified_ns) != (before.st_size, before.st_mtime_ns):
            entry = SourceEntry(path=str(path), num_bytes=before.st_size, modified_ns=before.st_mtime_ns, sha256="")
        if digests and not entry.sha256:
            entry = entry.model_copy(update={"sha256": sha256_of(path)})
        entries.append(entry)
    return tuple(entries)


def with_digests(sources: Iterable[SourceEntry]) -> tuple[SourceEntry, ...]:
    """Return the entries with the digests that they lack; that of a file which changed meanwhile stays empty."""
    sources = tuple(sources)
    same = [Path(entry.path) for entry in sources if not entry.sha256 and _is_same(entry)]
    found = {entry.path: entry for entry in record_sources(same, sources)}
    return tuple(found.get(entry.path, entry) for entry in sources)


def _is_same(entry: SourceEntry) -> bool:
    try:
        now = Path(entry.path).stat()
    except OSError:
        return False
    return (now.st_size, now.st_mtime_ns) == (entry.num_bytes, entry.modified_ns)


def _read_manifest(folder: Path | str) -> Manifest | None:
    try:
        text = Remote(folder).read(MANIFEST_NAME) if isinstance(folder, str) else read_small(folder / MANIFEST_NAME)
        with no_collection():
            return None if text is None else Manifest.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptError(
            "the manifest cannot be understood",
            where=f"{folder}/{MANIFEST_NAME}",
            found=f"{'.'.join(map(str, first['loc'])) or 'text'}: {first['msg']}",
            expected="a manifest written by this version of capgap",
            fix="delete this file and run the same command again",
        ) from None
