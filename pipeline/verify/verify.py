"""Check every finished stage below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import sha256_of
from capgap.pipeline.workflow.identity import content_of
from capgap.pipeline.workflow.state import read_manifest, require_seal
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import MANIFEST_NAME, Manifest


def verify(folder: Path) -> Iterator[str]:
    """A line for each finished stage at or below `folder`, after it was checked.

    Raises:
        InputError: there is none.
        CorruptError: a file, shard or manifest is not what it was.
    """
    found = sorted(folder.rglob(MANIFEST_NAME))
    if not found:
        raise InputError("no finished stage", where=folder, found=f"no {MANIFEST_NAME}", expected="at least one")
    for path in found:
        manifest = read_manifest(path.parent)
        assert manifest is not None
        num_members = _verify_stage(path.parent, manifest)
        num_bytes = sum(file.num_bytes for file in manifest.files)
        yield f"{manifest.instance}: {len(manifest.files)} files, {num_members} members, {num_bytes:,} bytes: sound"


def _verify_stage(folder: Path, manifest: Manifest) -> int:
    """Number of members checked."""
    require_seal(folder, manifest)
    if content_of(manifest.files, manifest.sources) != manifest.content:
        raise CorruptError("the manifest's list of files contradicts its own digest", where=folder / MANIFEST_NAME)
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            raise CorruptError("the file is gone", where=path, fix=_again(manifest))
        digest = sha256_of(path)
        if digest != file.sha256 or path.stat().st_size != file.num_bytes:
            raise CorruptError(
                "the file is not what it was",
                where=path,
                found=f"sha256 {digest[:12]}, {path.stat().st_size} bytes",
                expected=f"{file.sha256[:12]}, {file.num_bytes} bytes",
                fix=_again(manifest),
            )
    num_members = 0
    for shard_set in manifest.shard_sets.values():
        for shard in shard_set.shards:
            if shard.file not in manifest.files or shard.num_sequences != sum(shard.members.num_sequences):
                raise CorruptError(
                    "the manifest contradicts itself", where=folder / MANIFEST_NAME, found=f"shard {shard.file.path}"
                )
        reader = ShardReader(folder, shard_set)
        for index in range(shard_set.num_members):
            reader.read(index)
        num_members += shard_set.num_members
    return num_members


def _again(manifest: Manifest) -> str:
    return f"rerun it with `capgap run RUN.yaml --only {manifest.instance} --force`"
