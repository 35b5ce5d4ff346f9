"""Check every finished stage below a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.stage.manifests import read_manifest, read_work_order, require_seal
from capgap.pipeline.store import ShardReader
from capgap.pipeline.store.files import sha256_of
from capgap.pipeline.store.plain_tar import require_plain_tar
from capgap.pipeline.store.quarantine import write_quarantine
from capgap.pipeline.verify.sources import verify_sources
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.facts import CrossCheck
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME, FileEntry, Manifest, WorkOrder

Damage = dict[str, CorruptError]
"""What is wrong with each damaged file, by its path in the folder."""


def verify(folder: Path, quarantine: bool = False) -> Iterator[str]:
    """A line for each finished stage at or below `folder`, after it was checked, and lines on sources that are gone.

    Each stage's files are hashed, and so are the sources that it read, as far as they are still there.

    Args:
        folder: of a run or a stage.
        quarantine: go on past damaged shards, and whatever is damaged of a cache, list them in `quarantine.json` beside
            their manifest, a line each, and raise in the end; a list from earlier is replaced.

    Raises:
        InputError: there is none.
        CorruptError: a file, shard, manifest or source is not what it was.
    """
    found = sorted(folder.rglob(MANIFEST_NAME))
    if not found:
        raise InputError("no finished stage", where=folder, found=f"no {MANIFEST_NAME}", expected="at least one")
    damaged: list[Path] = []
    for path in found:
        manifest = read_manifest(path.parent)
        if manifest is None:
            raise CorruptError("no file but something else", where=path, fix="remove it")
        damage: Damage = {}
        num_members = _verify_stage(path.parent, manifest, damage if quarantine else None)
        remarks = verify_sources(manifest)
        num_bytes = sum(file.num_bytes for file in manifest.files)
        counts = f"{len(manifest.files)} files, {num_members} members, {num_bytes:,} bytes"
        counts += f", {len(manifest.sources)} sources" if manifest.sources else ""
        yield f"{manifest.instance}: {counts}: {f'{len(damage)} files in quarantine' if damage else 'sound'}"
        yield from remarks
        cross_check = manifest.facts.get("cross_check")
        if cross_check and (checked := CrossCheck.model_validate(cross_check)).differs:
            yield f"  {checked.sentence}"
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
    """Number of members that are sound; damage that the stage can mend is noted, or raised where `damage` is None."""
    _require_own_words(folder, manifest)
    shards = {shard.file.path for shard_set in manifest.shard_sets.values() for shard in shard_set.shards}
    for file in manifest.files:
        try:
            _require_digest(folder, file, manifest)
        except CorruptError as error:
            # a cache makes any of its files again, other stages can name nothing but shards
            if damage is None or (file.path not in shards and manifest.stage != "cache"):
                raise
            damage[file.path] = error
    if damage is not None:
        write_quarantine(folder, {name: str(error) for name, error in damage.items()})
    num_members = 0
    for shard_set in manifest.shard_sets.values():
        for shard in shard_set.shards:
            if shard.file not in manifest.files or shard.num_sequences != sum(shard.members.num_sequences):
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
            # without it no member can be read; it is a function of the corpus, and is written again
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
    """Raise CorruptError unless manifest and work order are what was written, and the list of files has its digest."""
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
