"""Small files of a finished folder, made available under their names in a local folder, as other libraries need them.

path   digests checked --> the folder itself
URL    --RemotePlace--> disk cache --copies, digests checked--> a folder that is removed when this process ends
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from capgap.pipeline.store.files import MAX_SMALL_BYTES, sha256_of, too_large
from capgap.pipeline.store.places import LocalPlace, ShardPlace, place_of
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import FileEntry


def folder_with(location: Path | str, files: Sequence[FileEntry]) -> Path:
    """Return a local folder that holds these files under their paths, each with the size and digest of its entry.

    The files are checked, or fetched, once in a process.

    Args:
        location: Path or URL of the folder to which the files belong.
        files: Entries of the folder's manifest; together the files have at most 256 MiB.

    Raises:
        CorruptError: A file does not have the size and digest of its entry.
        InputError: A file is missing or cannot be fetched, or the files are too large together.
    """
    if sum(file.num_bytes for file in files) > MAX_SMALL_BYTES:
        raise too_large(f"{location}/{files[0].path}")
    return _folder_with(location, tuple(files))


@lru_cache(maxsize=64)
def _folder_with(location: Path | str, files: tuple[FileEntry, ...]) -> Path:
    place = place_of(location)
    if isinstance(place, LocalPlace):
        for file in files:
            _require_listed(place.folder / file.path, file)
        return place.folder
    # a new folder for each call: two threads may be here at once, for two locations or for the same one
    folder = Path(tempfile.mkdtemp(prefix="capgap-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for file in files:
        _copy(place, file, folder / file.path)
        if sha256_of(folder / file.path) != file.sha256 and place.reopens(file):
            _copy(place, file, folder / file.path)
        _require_listed(folder / file.path, file)
    return folder


def _require_listed(path: Path, file: FileEntry) -> None:
    try:
        found = (path.stat().st_size, sha256_of(path))
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("the file is missing", where=path, fix="run the stage that wrote it again") from None
    if found != (file.num_bytes, file.sha256):
        raise CorruptError(
            "not the file that the manifest lists",
            where=path,
            found=f"{found[0]} bytes with sha256 {found[1][:12]}",
            expected=f"{file.num_bytes} bytes with {file.sha256[:12]}",
            fix="delete it and run the stage that wrote it again",
        )


def _copy(place: ShardPlace, file: FileEntry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with place.open(file) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
