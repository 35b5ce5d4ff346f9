"""Pointers of Git LFS: what lies in the place of a large file where a repository was cloned without it."""

from __future__ import annotations

from pathlib import Path

from capgap.schemas.errors import InputError

_POINTER = b"version https://git-lfs"


def require_no_pointer(file: Path, where: str | Path) -> None:
    """Raise InputError if a pointer of Git LFS lies in the place of a file."""
    if not file.is_file():
        return
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) != _POINTER:
            return
    raise InputError(
        "the file itself is not there",
        where=where,
        found=f"a Git LFS pointer in the place of {file.name}",
        fix="run `git lfs install` and `git lfs pull` in the folder",
    )
