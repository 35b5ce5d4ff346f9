"""Checks of the files outside a stage's folder that it read, against the digests that it wrote down.

gone                              a remark: a finished stage may outlive what it was made from
other content and other time      a remark: somebody has changed it, and `capgap status` calls the stage stale
other content at the same time    damage: nobody has written the file, but its bytes have changed
other content of a given model    damage, whatever the time is: later stages read the model there
"""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.stage.sources import place_below
from capgap.pipeline.store.files import sha256_of
from capgap.schemas.errors import CorruptError
from capgap.schemas.manifest import Manifest, SourceEntry


def verify_sources(manifest: Manifest) -> list[str]:
    """Return lines on the sources of a finished stage that are gone or were changed on purpose.

    Raises:
        CorruptError: A source is damaged.
    """
    # sources of a model may have relative paths, of the folder in which the stage was started
    given = manifest.facts.get("path")
    folder = Path(given) if isinstance(given, str) and Path(given).is_absolute() else None
    paths, remarks = [source.path for source in manifest.sources], []
    for source in manifest.sources:
        path = Path(source.path) if folder is None else folder / place_below(source.path, paths)
        if not path.is_file():
            remarks.append(f"  source {path} is gone: it was not compared")
        elif not _is_same(path, source):
            if folder is None and path.stat().st_mtime_ns != source.modified_ns:
                remarks.append(f"  source {path} was changed after the {manifest.stage} stage had read it")
                continue
            raise CorruptError(
                "the source is not what it was",
                where=path,
                found=f"{path.stat().st_size} bytes, of another sha256",
                expected=f"{source.num_bytes} bytes with sha256 {source.sha256[:12]}",
                fix="fetch the file again, or make what follows from it again: "
                f"`capgap run RUN.yaml --remake {manifest.instance}`",
            )
    return remarks


def _is_same(path: Path, source: SourceEntry) -> bool:
    return path.stat().st_size == source.num_bytes and sha256_of(path) == source.sha256
