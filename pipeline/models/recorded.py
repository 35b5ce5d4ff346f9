"""Check that a model's files still have the digests that were recorded when its stage finished.

    model made by a stage   folder/model/*           --> digests in the manifest's `files`
    model given as a folder that folder              --> digests in the manifest's `sources`
    model given by its id   no digests are recorded; the hub's own cache is trusted

A reader of a cache finds damage member by member. The files of weights have no checksums of their own, so one flipped
bit would pass unnoticed. Therefore their digests are checked before the work begins.

Cost: each process that opens the model reads and hashes every byte once, so this happens once for each stage and each
rank of a training. A process does not hash a file again while its size, time and inode stay the same. The result is not
shared between processes, as these three prove nothing about the bytes. The files of a model are hashed in parallel;
`docs/operations.md` gives the rate.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from capgap.pipeline.stage.context import StageInput
from capgap.pipeline.stage.sources import place_below
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.errors import CorruptError
from capgap.schemas.manifest import FileEntry, SourceEntry

_LOG = logging.getLogger("capgap")

_MOST_THREADS = 8
# hashing this many bytes takes a few seconds, which is worth a log line
_WORTH_A_LINE_BYTES = 4 << 30

_Found = tuple[int, int, int]
_HASHED: dict[Path, tuple[_Found, str]] = {}


def require_as_recorded(made: StageInput, folder: Path, is_given: bool) -> None:
    """Raise CorruptError unless the files of a finished stage's model have the digests that its manifest lists.

    A model without any weight files is not refused here, as its loading then says what is missing.

    Args:
        made: the stage that made the model or was given it.
        folder: folder of the model.
        is_given: whether the model was given, and lies outside the stage's folder.
    """
    entries = _given(made, folder) if is_given else _made(made, folder)
    recorded = (path for path, _ in entries if path.suffix == ".safetensors")
    if not any(path.is_file() for path in (*folder.glob("*.safetensors"), *recorded)):
        return
    num_bytes = sum(entry.num_bytes for _, entry in entries)
    if num_bytes > _WORTH_A_LINE_BYTES:
        _LOG.info("%s: the digests of %.1f GB are checked", folder, num_bytes / 1e9)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(lambda pair: _digest(pair[0]), entries))
    for (path, entry), digest in zip(entries, digests, strict=True):
        if digest != entry.sha256:
            raise _damaged(path, digest, entry, made, is_given)


def _made(made: StageInput, folder: Path) -> list[tuple[Path, FileEntry | SourceEntry]]:
    """Return the model's files in the manifest, without the model card, which nothing reads."""
    inside = f"{folder.relative_to(made.path).as_posix()}/"
    listed = (file for file in made.manifest.files if file.path.startswith(inside) and not file.path.endswith(".md"))
    return [(made.path / file.path, file) for file in listed]


def _given(made: StageInput, folder: Path) -> list[tuple[Path, FileEntry | SourceEntry]]:
    """Return the source files below the model's folder; their recorded paths may be relative to another directory."""
    paths = [source.path for source in made.manifest.sources]
    return [(folder / place_below(source.path, paths), source) for source in made.manifest.sources]


def _digest(path: Path) -> str | None:
    """Return the sha256 of a file; None where there is no file."""
    try:
        status = path.stat()
        found = (status.st_size, status.st_mtime_ns, status.st_ino)
        known = _HASHED.get(path)
        if known is None or known[0] != found:
            known = _HASHED[path] = (found, sha256_of(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return known[1]


def _damaged(
    path: Path, digest: str | None, entry: FileEntry | SourceEntry, made: StageInput, is_given: bool
) -> CorruptError:
    again = f"--remake {made.manifest.instance}"
    fix = f"make the model again: `capgap run RUN.yaml {again}`"
    if is_given:
        fix = f"fetch the model's files again; if it is meant to be another model now, say so with {again}"
    return CorruptError(
        "the model's file is not what it was" if digest is not None else "the model's file is gone",
        where=path,
        found=None if digest is None else f"sha256 {digest[:12]}, {path.stat().st_size} bytes",
        expected=f"sha256 {entry.sha256[:12]}, {entry.num_bytes} bytes, as when the {made.manifest.stage} stage ended",
        fix=fix,
    )
