"""The life of a stage folder: begun (`work.json`), worked on (`work/`), finished (`manifest.json`).

    clear --> work.json --> files and work/ --> all on the disk --> manifest.json --> work/ removed

If a process is killed in between, the folder has no manifest, and no reader takes it for finished. A power failure
may lose whatever was not flushed, so the manifest is written only when the whole result is on the disk.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from capgap.pipeline.stage.heartbeat import require_nobody_elsewhere
from capgap.pipeline.stage.identity import seal_of
from capgap.pipeline.stage.seconds import take_over
from capgap.pipeline.stage.versions import note_versions
from capgap.pipeline.store.files import TEMP_MARK, sha256_of, sync_file, sync_folder, write_atomically
from capgap.pipeline.store.locks import ProcessLock
from capgap.pipeline.store.quarantine import QUARANTINE_NAME
from capgap.schemas.errors import InputError, MachineError, SettingError
from capgap.schemas.heartbeat import Units
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME, FileEntry, Manifest, WorkOrder

WORK_FOLDER = "work"
# logs are for people and their tools, which may add to them or delete them, so they are no part of the result
LOGS_FOLDER = "logs"
LOCK_NAME = ".lock"
TURN_NAME = ".turn"
_PLAN_NAME = "plan.json"
_STEP = re.compile(r"step-(\d{1,15})")
_LOCKS = (LOCK_NAME, TURN_NAME)
_NOT_CONTENT = {MANIFEST_NAME, WORK_NAME, QUARANTINE_NAME, *_LOCKS}


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock the folder for this process alone while the block runs; the lock ends with the process.

    The work folder that a kill left beside a finished stage's manifest is removed.

    Raises:
        MachineError: Another process works on the folder, on this machine or on one that its locks do not reach; or
            the file system has no locks.
    """
    make_folder(folder)
    with ProcessLock(folder / LOCK_NAME) as lock:
        if not lock.exclusive():
            raise in_use(folder)
        remove_leftovers(folder)
        require_nobody_elsewhere(folder / WORK_FOLDER)
        yield


def make_folder(folder: Path) -> None:
    """Make the folder and its parents, where they are missing.

    Raises:
        SettingError: A file stands in the way, or the place cannot hold folders.
        InputError: A folder stands in the place of one of the stage's own files.
    """
    for name in (MANIFEST_NAME, WORK_NAME, QUARANTINE_NAME, *_LOCKS):
        if (folder / name).is_dir():
            raise InputError(
                "a folder stands where a file belongs",
                where=folder / name,
                fix="move it away and run the same command again",
            )
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError, FileNotFoundError) as error:
        raise SettingError(
            "no folder can be made there",
            where="out",
            found=f"{error.filename}: {os.strerror(error.errno or 0)}",
            expected="a folder, or a place for one",
            fix="choose another `out`",
        ) from None
    for one in missing:
        sync_folder(one.parent)


def in_use(folder: Path) -> MachineError:
    """Return the error that says that another process works on the folder."""
    return MachineError("another process is at work on this folder", where=folder, fix="wait for it to end, or stop it")


def clear(folder: Path) -> None:
    """Empty the folder, manifest first, so that a kill in between leaves nothing that looks finished."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    (folder / WORK_NAME).unlink(missing_ok=True)
    # flushed, so that no power failure keeps the manifest and loses the files that it lists
    sync_folder(folder)
    for path in folder.iterdir():
        if path.name in _LOCKS:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def begin(folder: Path, order: WorkOrder) -> None:
    """Write down what the folder is for, and keep what an earlier process with the same work order finished."""
    # made before the work order is written, so that a folder with a work order always has a work folder
    (folder / WORK_FOLDER).mkdir(exist_ok=True)
    note_versions(folder / WORK_FOLDER, order.instance)
    take_over(folder / WORK_FOLDER)
    write_order(folder, order)
    remove_halves(folder)


def write_order(folder: Path, order: WorkOrder) -> None:
    """Write down what the folder is for, in place of what was written before."""
    write_atomically(folder / WORK_NAME, order.model_dump_json(indent=1))


def remove_halves(folder: Path) -> None:
    """Remove half-written files, which kills left; the caller knows that no other process is writing here."""
    for path in list(folder.rglob(f"*{TEMP_MARK}*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def finish(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, which makes the folder a finished one, and return it with its seal.

    Every file of the manifest is on the disk before the manifest is written, and the manifest is before the work folder
    is removed. Whenever the power fails, the disk holds a whole stage, or one that can be continued.
    """
    # every quarantined file has been made again
    (folder / QUARANTINE_NAME).unlink(missing_ok=True)
    _sync_files(folder, manifest)
    sealed = manifest.model_copy(update={"seal": seal_of(manifest)})
    write_atomically(folder / MANIFEST_NAME, sealed.model_dump_json(indent=1))
    remove_leftovers(folder)
    return sealed


def remove_leftovers(folder: Path) -> None:
    """Remove the work folder of a finished stage, which is still there if a process was killed after its manifest.

    The caller holds the folder's lock.
    """
    if (folder / MANIFEST_NAME).is_file():
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)


def _sync_files(folder: Path, manifest: Manifest) -> None:
    """Wait until the disk has every file of the result, and every folder that leads to one.

    Each flush takes milliseconds. Shards, of which there may be many thousands, are left out: their writer has flushed
    them.
    """
    shards = {shard.file for shard_set in manifest.shard_sets.values() for shard in shard_set.shards}
    paths = [folder / file.path for file in manifest.files]
    for file, path in zip(manifest.files, paths, strict=True):
        if file not in shards:
            sync_file(path)
    folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(folder)} | {folder}
    for one in sorted(folders, reverse=True):
        sync_folder(one)


def content_files(folder: Path) -> tuple[FileEntry, ...]:
    """Return an entry with the digest of every file of the result, by path; half-written files are left out."""
    entries = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if (
            relative.parts[0] in (WORK_FOLDER, LOGS_FOLDER)
            or str(relative) in _NOT_CONTENT
            or TEMP_MARK in str(relative)
        ):
            continue
        if path.is_file():
            entries.append(FileEntry(path=relative.as_posix(), num_bytes=path.stat().st_size, sha256=sha256_of(path)))
    return tuple(entries)


def is_untouched(folder: Path) -> bool:
    """Return whether a folder was begun but holds no finished unit of work, so that nothing could be continued."""
    work = folder / WORK_FOLDER
    return work.is_dir() and finished_units(work).partition(" of ")[0] in ("begun", "0")


def plan_units(work: Path, unit: str, total: int, pattern: str) -> None:
    """Write down how many units there are to make, so that `capgap status` can say how far a killed stage got.

    Args:
        work: The stage folder's `work`.
        unit: Word for the units, in the plural.
        total: Number of units.
        pattern: Glob below `work` for the files that mark finished units: one file per finished unit, or files named
            after the number of finished units, as in `checkpoints/step-000200.ckpt`.
    """
    work.mkdir(exist_ok=True)
    write_atomically(work / _PLAN_NAME, Units(unit=unit, total=total, pattern=pattern).model_dump_json())


def finished_units(work: Path) -> str:
    """Return in words how far an unfinished stage got."""
    try:
        plan = Units.model_validate_json((work / _PLAN_NAME).read_bytes())
        names = [path.stem for path in work.glob(plan.pattern)]
    except (OSError, ValueError):
        return "begun"
    numbers = [int(found[1]) for name in names if (found := _STEP.fullmatch(name))]
    return f"{max(numbers) if numbers else len(names)} of {plan.total} {plan.unit}"
