"""Git LFS pointers, which replace large files in a repository that was cloned without them."""

from __future__ import annotations

from pathlib import Path

from capgap.schemas.errors import InputError

_POINTER = b"version https://git-lfs"


def require_no_pointer(file: Path, where: str | Path) -> None:
    """Raise InputError if a file holds a Git LFS pointer instead of its content."""
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
