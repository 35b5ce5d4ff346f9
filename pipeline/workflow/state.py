"""Is a stage current? Decided from the run file and the manifests on disk, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.store import Remote, is_url
from capgap.pipeline.store.files import read_small
from capgap.pipeline.store.quarantine import read_quarantine
from capgap.pipeline.workflow.context import Instance, StageName
from capgap.pipeline.workflow.folder import WORK_FOLDER, finished_units
from capgap.pipeline.workflow.graph import (
    CHAT_CACHE,
    decisive_settings,
    further_caches,
    implied_inputs,
    input_names,
    instances,
)
from capgap.pipeline.workflow.identity import first_difference, identity_of, seal_of
from capgap.pipeline.workflow.sources import changed_source
from capgap.schemas.errors import CorruptError, InputError
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME, InputEntry, Manifest, WorkOrder
from capgap.schemas.run_file import RunFile


class State(StrEnum):
    """Where a stage stands."""

    CURRENT = "current"
    STALE = "stale"
    PARTIAL = "partial"
    MISSING = "missing"


@dataclass(frozen=True)
class StageState:
    """One instance, and why it stands where it stands.

    Attributes:
        instance: which.
        folder: its folder, also where it does not exist yet.
        state: where it stands.
        why: in words: the setting or input that changed, or how far it got; empty when current.
        order: what is to be done, as `work.json` will say; its inputs may lack a content as long as they are unmade.
        manifest: of the folder, where there is one.
        lost: files of a finished folder that are gone, of another size or in quarantine, where nothing else is amiss.
        in_quarantine: all of them are: what is left can be read, by who may skip.
        begun_otherwise: of an unfinished folder, the setting or input in which it was begun for another result, in
            words; empty where it can be continued.
    """

    instance: Instance
    folder: Path
    state: State
    why: str
    order: WorkOrder
    manifest: Manifest | None
    begun_otherwise: str = ""
    lost: tuple[str, ...] = ()
    in_quarantine: bool = False

    def can_be_read(self, run: RunFile, reader: Instance) -> bool:
        """Whether that instance may read the folder: it is current, or lacks only what the reader is told to skip."""
        if self.in_quarantine and reader.stage == "train" and reader.arm is not None:
            return run.train_settings(reader.arm).on_corrupt == "skip"
        if self.in_quarantine and reader.stage == "eval":
            return True  # held-out shards in quarantine are not measured on, others not read
        return self.state is State.CURRENT


def states(run: RunFile) -> dict[str, StageState]:
    """The state of every instance, by name.

    Raises:
        InputError: a folder named under `reuse` or `train.caches` holds no manifest of that stage.
        CorruptError: a manifest cannot be read.
    """
    reused = reused_manifests(run)
    known = {name: _entry(*at) for name, at in reused.items()}
    found: dict[str, StageState] = {}
    # every arm and seed may read the same one, of a million members
    read = lru_cache(maxsize=None)(_finished)
    for instance in instances(run):
        further = {name: _entry(*at) for name, at in further_manifests(run, instance, read).items()}
        state = _state_of(run, instance, known | further, found)
        found[instance.name] = state
        content = state.manifest.content if state.manifest and state.state is State.CURRENT else ""
        known[instance.name] = InputEntry(path=str(state.folder), identity=state.order.identity, content=content)
    return found


Finished = tuple[Path | str, Manifest]
"""Folder, or URL, and manifest of a finished stage."""


def reused_manifests(run: RunFile) -> dict[str, Finished]:
    """Every reused stage, by the stage's name."""
    return {str(stage): _finished(stage, folder, f"reuse.{stage}") for stage, folder in run.reuse.items()}


def further_manifests(
    run: RunFile, instance: Instance, read: Callable[[StageName, str, str], Finished] | None = None
) -> dict[str, Finished]:
    """Each further cache that the instance reads, by the name of the input; `read` is what finds one.

    Raises:
        InputError: a folder or URL holds no finished cache.
    """
    found = further_caches(run, instance)
    find = read or _finished
    return {
        name: find("cache", folder, "tune.cache" if name == CHAT_CACHE else f"train.{name.replace('/', '.')}")
        for name, folder in found.items()
    }


def read_manifest(folder: Path | str) -> Manifest | None:
    """The manifest of a finished folder, given by its path or URL; None where there is none.

    Raises:
        CorruptError: it cannot be understood.
        InputError, MachineError: the URL cannot be read.
    """
    try:
        text = Remote(folder).read(MANIFEST_NAME) if isinstance(folder, str) else read_small(folder / MANIFEST_NAME)
        return None if text is None else Manifest.model_validate_json(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptError(
            "the manifest cannot be understood",
            where=f"{folder}/{MANIFEST_NAME}",
            found=f"{'.'.join(map(str, first['loc'])) or 'text'}: {first['msg']}",
            expected="a manifest written by this version of capgap",
            fix="delete this file and run the same command again",
        ) from None


def require_seal(folder: Path | str, manifest: Manifest) -> None:
    """Raise CorruptError if the manifest is not what was written when its stage was finished."""
    try:
        seal = seal_of(manifest)
    except ValueError as error:  # a number that no manifest of ours holds: not a number, or of thousands of digits
        seal = str(error)
    if manifest.seal != seal:
        raise CorruptError(
            "the manifest is not what was written",
            where=f"{folder}/{MANIFEST_NAME}",
            found=f"a digest of {seal[:12]}",
            expected=f"its seal, {manifest.seal[:12] or 'none'}",
            fix="delete this file and run the same command again",
        )


def read_work_order(folder: Path) -> WorkOrder | None:
    """What an unfinished folder was begun for; None where nothing was begun, or where that cannot be read."""
    try:
        return WorkOrder.model_validate_json((folder / WORK_NAME).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def finished_stage(stage: StageName, folder: str, what: str, where: str, expected: str) -> Finished:
    """A finished stage by its folder or URL; its seal is not looked at.

    Args:
        stage: which must stand there.
        folder: path, or URL.
        what: the fault where it does not, in the caller's words; `where` and `expected` likewise.
        where: see `what`.
        expected: see `what`.

    Raises:
        InputError: none is there, or another one.
        CorruptError, MachineError: as `read_manifest`.
    """
    location = folder.rstrip("/") if is_url(folder) else Path(folder)
    manifest = read_manifest(location)
    if manifest is None or manifest.stage != stage:
        found = "no manifest.json" if manifest is None else f"a finished {manifest.stage} stage"
        raise InputError(what, where=where, found=found, expected=expected)
    return location, manifest


def _finished(stage: StageName, folder: str, setting: str) -> Finished:
    expected = f"the folder of a finished {stage} stage"
    return finished_stage(stage, folder, "cannot be reused", f"{setting}: {folder}", expected)


def _state_of(
    run: RunFile, instance: Instance, known: Mapping[str, InputEntry], found: Mapping[str, StageState]
) -> StageState:
    folder = Path(run.out) / instance.name
    settings = json.loads(json.dumps(decisive_settings(run, instance)))
    inputs = {name: known[name] for name in (*input_names(run, instance), *further_caches(run, instance))}
    implied = implied_inputs(instance)
    deciding = {name: entry.identity for name, entry in inputs.items() if name not in implied}
    identity = identity_of(instance.stage, settings, deciding)
    order = WorkOrder(stage=instance.stage, instance=instance.name, settings=settings, inputs=inputs, identity=identity)
    manifest = read_manifest(folder)
    if manifest is not None:
        why = _difference(manifest, order)
        quarantined = read_quarantine(folder)
        lost = {} if why else _lost_files(folder, manifest, quarantined)
        other = why or changed_source(run, instance, manifest.sources) or _waiting(run, instance, inputs, found)
        why = why or next(iter(lost.values()), "") or other
        return StageState(
            instance,
            folder,
            State.STALE if why else State.CURRENT,
            why,
            order,
            manifest,
            lost=() if other else tuple(lost),
            in_quarantine=bool(lost) and not other and lost.keys() <= quarantined.keys(),
        )
    begun = read_work_order(folder)
    if begun is None:
        return StageState(instance, folder, State.MISSING, "never made", order, None)
    why = finished_units(folder / WORK_FOLDER)
    changed = _difference(begun, order)
    if changed:
        why = f"{why}, begun under other settings: {changed}"
    return StageState(instance, folder, State.PARTIAL, why, order, None, changed)


def _entry(path: Path | str, manifest: Manifest) -> InputEntry:
    return InputEntry(path=str(path), identity=manifest.identity, content=manifest.content)


def _difference(old: WorkOrder, new: WorkOrder) -> str:
    """What makes the old order another one than the new, in words; empty where nothing does."""
    if old.identity != new.identity:
        setting = first_difference(old.settings, new.settings)
        if setting:
            name, before, after = setting
            return f"{name} was {json.dumps(before)}, is {json.dumps(after)}"
        changed = [
            name
            for name in sorted(old.inputs.keys() | new.inputs.keys())
            if name not in old.inputs
            or name not in new.inputs
            or old.inputs[name].identity != new.inputs[name].identity
        ]
        return f"input {', '.join(changed)} changed" if changed else "made by another version of capgap"
    for name, entry in new.inputs.items():
        # an implied input may be new
        if entry.content and name in old.inputs and old.inputs[name].content != entry.content:
            return f"input {name} was made again and came out different"
    return ""


def _lost_files(folder: Path, manifest: Manifest, quarantined: Mapping[str, str]) -> dict[str, str]:
    """What has become of each file that is not as it was, in words, by path."""
    lost = {}
    for file in manifest.files:
        path = folder / file.path
        if file.path in quarantined:
            lost[file.path] = f"{file.path} is in quarantine"
        elif not path.is_file():
            lost[file.path] = f"{file.path} is gone"
        elif path.stat().st_size != file.num_bytes:
            lost[file.path] = f"{file.path} has {path.stat().st_size} bytes, not {file.num_bytes}"
    return lost


def _waiting(
    run: RunFile, instance: Instance, inputs: Mapping[str, InputEntry], found: Mapping[str, StageState]
) -> str:
    for name in inputs:
        if name in found and not found[name].can_be_read(run, instance):
            return f"input {name} is {found[name].state}"
    return ""
