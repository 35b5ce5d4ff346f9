"""Finds the files that a source names, and leaves out the files of a folder that are no text of the corpus.

A source that exists as a path is taken as this path, whatever characters it holds; otherwise it may be a pattern. Of a
folder, all files of a known kind are read except hidden files, licences, and files that describe a data set.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from pathlib import Path, PurePath

from capgap.pipeline.corpus.kinds import TEXT_SUFFIXES, Place, is_packed, kind_of, known_suffixes
from capgap.pipeline.corpus.places import places_of_url
from capgap.pipeline.store import is_url
from capgap.pipeline.store.files import files_below
from capgap.schemas.errors import InputError
from capgap.schemas.run_corpus import CorpusSettings

BUILTIN = "builtin:python"
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LICENCES = ("licence", "license", "copying", "notice")
# files that the library `datasets` writes beside the data
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def list_places(sources: tuple[str, ...], section: str = "corpus") -> list[Place]:
    """Return the files that the sources name, in reading order; a file that is named several times is listed once.

    Args:
        sources: files, folders and patterns, on this machine or as URLs; or `BUILTIN`, which is returned unchanged.
        section: the section of the run file that names the sources, for errors.

    Raises:
        InputError: a source names nothing, or a file of an unknown kind.
        MachineError: the client for a URL is not installed.
    """
    found: dict[Place, Place] = {}
    for source in sources:
        for place in [BUILTIN] if source == BUILTIN else _files_of(source, section):
            found.setdefault(_identity(place), place)
    return list(found.values())


def list_files(sources: tuple[str, ...], section: str = "corpus") -> list[Place]:
    """Return the files that the sources name, in reading order, without the builtin text."""
    return [place for place in list_places(sources, section) if place != BUILTIN]


def places_by_source(settings: CorpusSettings) -> list[list[Place]]:
    """Return the files of each source of a corpus; in a plain list, a file belongs to the first source that names it.

    Raises:
        InputError: a source names nothing, or a file of an unknown kind; or two sources of a mixture name one text.
        MachineError: the client for a URL is not installed.
    """
    found: list[list[Place]] = []
    claimed: dict[tuple[Place, str], str] = {}
    for name, source in settings.named_sources:
        found.append([])
        for place in list_places(source.paths):
            # fields of one file may hold different texts; a conversation, or a text file, is the same for every source
            has_fields = settings.messages_field is None and kind_of(place) not in TEXT_SUFFIXES
            key = (_identity(place), (source.text_field or settings.text_field) if has_fields else "")
            if key not in claimed:
                claimed[key] = name
                found[-1].append(place)
            elif settings.mixture:
                raise InputError(
                    "two sources of the mixture name the same text",
                    where=f"corpus.mixture.{name}: {place}",
                    found=f"the same text in corpus.mixture.{claimed[key]}",
                    expected="the text in one source only, whose weight and max_tokens apply to it",
                    fix="take it out of the paths of the other",
                )
    return found


def _identity(place: Place) -> Place:
    """Return a value that is equal for the same file, whatever path or link leads to it."""
    return place.resolve() if isinstance(place, Path) else place


def local_files(sources: tuple[str, ...], section: str = "corpus") -> list[Path]:
    """Return the files on this machine that the sources name; URLs are skipped without asking their servers."""
    here = tuple(source for source in sources if not is_url(source))
    return [path for path in list_files(here, section) if isinstance(path, Path)]


def folders_in_words(sources: tuple[str, ...]) -> list[str]:
    """Return one line for each source that is a folder, with the number of files by suffix, read and not read."""
    lines = []
    for source in sources:
        folder = None if is_url(source) else _as_path(source)
        if folder is not None and folder.is_dir():
            read = _read_of(folder)
            others = sorted(set(_all_files(folder)) - set(read))
            links = sum(path.is_symlink() and not path.is_file() for path in folder.rglob("*"))
            said = f"read {_counts(read)}" + (f"; not read: {_counts(others)}" if others else "; nothing else")
            said += f"; {links} links to folders (each folder is read once) or to nothing" if links else ""
            lines.append(f"{source}: {said}")
    return lines


def _files_of(source: str, section: str) -> list[Place]:
    path = _as_path(source)
    found: list[Place]
    if is_url(source):
        path, found, expected = None, _of_url(source, section), f"files ending in {known_suffixes()}"
    elif path is not None and path.is_dir():
        found, expected = list(_read_of(path)), f"files ending in {known_suffixes()}"
    elif path is not None and path.is_file():
        found, expected = [path], "a file"
    elif path is not None and glob.has_magic(source):
        pattern = _pattern(source)
        found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]  # noqa: PTH207 (an absolute pattern)
        expected = "at least one matching file"
    else:
        found, expected = [], f"a file, a folder, a glob or {BUILTIN}"
    is_shown = path is not None or is_url(source)
    where = f"{section}.sources: {source}" if is_shown else f"{section}.sources: {source!a}"
    if not found:
        raise InputError("no text found", where=where, found="nothing", expected=expected, fix=_fix(source, path))
    for file in found:
        if kind_of(file) is None:
            raise InputError(
                "unknown kind of file",
                where=f"{section}.sources: {file}",
                found=PurePath(str(file)).suffix or "no suffix",
                expected=known_suffixes(),
            )
    return found


def _of_url(url: str, section: str) -> list[Place]:
    """Return the files that a URL names; if there are several, only those of a known kind."""
    try:
        found = places_of_url(url)
    except InputError as error:
        raise InputError(
            error.what, where=f"{section}.sources: {url}", found=error.found, expected=error.expected, fix=error.fix
        ) from None
    known = [place for place in found if kind_of(place) is not None]
    return list(known if len(found) > 1 else found)


def _fix(source: str, path: Path | None) -> str:
    """Return the advice for a source that does not exist."""
    if is_url(source):
        return "check the address and the credentials"
    if _ID.fullmatch(source) and kind_of(Path(source)) is None and not Path(source).parent.is_dir():
        return f"check the path, from {Path.cwd()}; a data set of the hub has to be downloaded first: " + (
            f"`hf download --repo-type dataset {source} --local-dir FOLDER`"
        )
    return "check the path" + ("" if path is None or path.is_absolute() else f", from {Path.cwd()}")


def _as_path(source: str) -> Path | None:
    """Return the source as a path; None if it cannot be one, because it holds a null character."""
    return None if "\0" in source else Path(source)


def _pattern(source: str) -> str:
    """Return the pattern with its existing leading folders escaped, so that their names are taken literally."""
    path = Path(source)
    known = Path(path.anchor)
    parts = list(path.parts[1:] if path.anchor else path.parts)
    while len(parts) > 1 and (known / parts[0]).is_dir():
        known /= parts.pop(0)
    return str(Path(glob.escape(str(known)), *parts))


def _read_of(folder: Path) -> list[Path]:
    visible = [path for path in _all_files(folder) if not _is_hidden(path, folder)]
    known = [path for path in visible if kind_of(path) is not None and not _is_beside(path)]
    with_records = {parent for path in known if kind_of(path) not in TEXT_SUFFIXES for parent in path.parents}
    cards = {path for path in known if path.stem.lower() == "readme" and path.parent in with_records}
    return [path for path in known if path not in cards]


def _all_files(folder: Path) -> list[Path]:
    return [path for path in sorted(files_below(folder)) if path.is_file()]


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_beside(path: Path) -> bool:
    """Return whether a file of a known kind is a description, a licence or a cache file instead of corpus text."""
    name = path.name.lower()
    if name in _DESCRIPTIONS or name.split(".")[0].split("-")[0] in _LICENCES:
        return True
    state = path.parent / "state.json"
    if path.suffix != ".arrow" or not state.is_file():
        return False
    # the state.json of `save_to_disk` lists the data files of its folder; other files are caches
    try:
        listed = [str(one["filename"]) for one in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return path.name not in listed


def _counts(paths: list[Path]) -> str:
    """Return the number of files of each suffix, for example `3 .jsonl, 1 .parquet`."""
    counts = Counter("".join(path.suffixes[-2 if is_packed(path) else -1 :]) or path.name for path in paths)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(counts.items(), key=lambda c: (-c[1], c[0])))
