"""The run files that come with capgap, which every command accepts by name, in any folder."""

from __future__ import annotations

import difflib
from itertools import takewhile
from pathlib import Path

from capgap.schemas.errors import InputError

FOLDER = Path(__file__).parent / "runs"


def shipped_names() -> list[str]:
    """Return the names of the run files and grid files that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_file(given: str | Path) -> Path:
    """Return the file at a path or, if there is none, the shipped file of that name.

    Raises:
        InputError: there is neither, or the path is no file.
    """
    path, name = Path(given).expanduser(), str(given).removesuffix(".yaml")
    if path.is_file():
        return path
    if name in shipped_names():
        return FOLDER / f"{name}.yaml"
    if path.exists():
        raise InputError(
            "not a run file", where=given, found="a folder" if path.is_dir() else "a device", expected="a file"
        )
    near = difflib.get_close_matches(name, shipped_names(), n=1)
    fix = (
        f"did you mean {near[0]}, which is shipped?"
        if near
        else "`capgap init` writes one, and `capgap ls` lists examples"
    )
    raise InputError("no such run file", where=given, fix=fix)


def first_comment(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a run file."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return " ".join(line.removeprefix("#").strip() for line in lines).partition(". ")[0].rstrip(".")
