"""Files outside the run, and whether those that a finished stage read are still the same."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stages import stage_named
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import SourceEntry
from capgap.schemas.run_file import RunFile


def source_paths(run: RunFile, instance: Instance) -> list[Path]:
    """Return the files outside the run that the instance reads; none for a Hugging Face id and for builtin text.

    Raises:
        InputError: A file that the run file names does not exist.
    """
    return stage_named(instance.stage).sources(run, instance)


def changed_source(run: RunFile, instance: Instance, recorded: tuple[SourceEntry, ...]) -> str:
    """Say in words which file is the first that is new, gone or changed; empty where none is.

    If all sources are gone, nothing has changed: a finished corpus may outlive the text that it was made from.
    """
    try:
        now = {str(path): path for path in source_paths(run, instance)}
    except InputError:
        return ""
    then = {entry.path: entry for entry in recorded}
    if not now:
        return ""
    for path in sorted(now.keys() ^ then.keys()):
        return f"source {path} is {'new' if path in now else 'gone'}"
    for path, entry in then.items():
        found = now[path].stat()
        if found.st_size == entry.num_bytes and found.st_mtime_ns == entry.modified_ns:
            continue
        if found.st_size != entry.num_bytes or not entry.sha256 or sha256_of(now[path]) != entry.sha256:
            return f"source {path} changed"
    return ""
