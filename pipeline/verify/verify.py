"""Checks of every finished stage below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest, read_work_order, require_seal
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import files_below, sha256_of
from capgap.pipeline.store.plain_tar import require_plain_tar
from capgap.pipeline.store.quarantine import write_quarantine
from capgap.pipeline.verify.sources import verify_sources
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.facts import CrossCheck
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME, FileEntry, Manifest, WorkOrder

Damage = dict[str, CorruptError]
"""The error for each damaged file, by its path in the folder."""


def verify(folder: Path, quarantine: bool = False) -> Iterator[str]:
    """Check each finished stage at or below `folder`, and yield a line about it, and lines on sources that are gone.

    Each stage's files are hashed, and so are the sources that it read, as far as they still exist.

    Args:
        folder: Folder of a run or a stage.
        quarantine: Whether to continue past damaged shards and damaged files of a cache. They are listed in
            `quarantine.json` beside the manifest, in place of an earlier list, with a line each, and an error is raised
            at the end.

    Raises:
        InputError: There is no finished stage.
        CorruptError: A file, shard, manifest or source is damaged.
    """
    found = sorted(path for path in files_below(folder) if path.name == MANIFEST_NAME)
    if not found:
        raise InputError("no finished stage", where=folder, found=f"no {MANIFEST_NAME}", expected="at least one")
    damaged: list[Path] = []
    for path in found:
        manifest = read_manifest(path.parent)
        if manifest is None:
            raise CorruptError("the manifest's path is not a file", where=path, fix="remove it")
        damage: Damage = {}
        num_members = _verify_stage(path.parent, manifest, damage if quarantine else None)
        remarks = verify_sources(manifest)
        num_bytes = sum(file.num_bytes for file in manifest.files)
        counts = f"{len(manifest.files)} files, {num_members} members, {num_bytes:,} bytes"
        counts += f", {len(manifest.sources)} sources" if manifest.sources else ""
        yield f"{manifest.instance}: {counts}: {f'{len(damage)} files in quarantine' if damage else 'sound'}"
        yield from remarks
        engines = manifest.facts.get("cross_check")
        if engines and (check := CrossCheck.model_validate(engines)).differs:
            yield f"  {check.sentence}"
        for name, error in damage.items():
            yield f"  {name}: {error}"
            damaged.append(path.parent / name)
    if damaged:
        raise CorruptError(
            "damaged files are in quarantine",
            where=folder,
            found=", ".join(map(str, damaged)),
            fix="run the stage that wrote them again, or train with train.on_corrupt set to skip",
        )


def _verify_stage(folder: Path, manifest: Manifest, damage: Damage | None) -> int:
    """Return the number of sound members; damage that the stage can mend is noted, or raised if `damage` is None."""
    _require_own_words(folder, manifest)
    shards = {shard.file.path for shard_set in manifest.shard_sets.values() for shard in shard_set.shards}
    for file in manifest.files:
        try:
            _require_digest(folder, file, manifest)
        except CorruptError as error:
            # a cache can make any of its files again, other stages only their shards
            if damage is None or (file.path not in shards and manifest.stage != "cache"):
                raise
            damage[file.path] = error
    if damage is not None:
        write_quarantine(folder, {name: str(error) for name, error in damage.items()})
    num_members = 0
    listed = set(manifest.files)
    for shard_set in manifest.shard_sets.values():
        for shard in shard_set.shards:
            if shard.file not in listed or shard.num_sequences != sum(shard.members.num_sequences):
                raise CorruptError(
                    "the manifest contradicts itself", where=folder / MANIFEST_NAME, found=f"shard {shard.file.path}"
                )
    for shard_set in manifest.shard_sets.values():
        try:
            reader = ShardReader(folder, shard_set)
        except CorruptError as error:
            ranking = shard_set.codec_settings.get("ranking")
            if damage is None or not isinstance(ranking, str):
                raise
            # without the ranking no member can be read; it depends on the corpus alone, so it can be written again
            damage.setdefault(ranking, error)
            continue
        for number, shard in enumerate(shard_set.shards):
            if damage and shard.file.path in damage:
                continue
            try:
                require_plain_tar(folder / shard.file.path, shard)
                for member in range(len(shard.members)):
                    reader.read_member(number, member)
            except CorruptError as error:
                if damage is None:
                    raise
                damage[shard.file.path] = error
                continue
            num_members += len(shard.members)
    if damage is not None:
        write_quarantine(folder, {name: str(error) for name, error in damage.items()})
    return num_members


def _require_own_words(folder: Path, manifest: Manifest) -> None:
    """Raise CorruptError unless manifest and work order are unchanged, and the list of files agrees with its digest."""
    require_seal(folder, manifest)
    if content_of(manifest.files, manifest.sources) != manifest.content:
        raise CorruptError("the manifest's list of files contradicts its own digest", where=folder / MANIFEST_NAME)
    begun_for = WorkOrder(**{name: getattr(manifest, name) for name in WorkOrder.model_fields})
    if (folder / WORK_NAME).exists() and read_work_order(folder) != begun_for:
        raise CorruptError(
            "not what the stage was begun for",
            where=folder / WORK_NAME,
            expected=f"what {MANIFEST_NAME} says",
            fix="delete it: a finished stage does not need it",
        )


def _require_digest(folder: Path, file: FileEntry, manifest: Manifest) -> None:
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


def _again(manifest: Manifest) -> str:
    again = f"rerun it with `capgap run RUN.yaml --only {manifest.instance} --force`"
    if manifest.stage != "cache":
        return again
    return f"{again}, or `capgap verify --quarantine` and then the stage, which makes damaged shards alone again"
