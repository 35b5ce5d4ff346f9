"""Is a stage current? Decided from the run file and the manifests on disk, and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from capgap.pipeline.stage.context import CHAT_CACHE, Instance, StageName
from capgap.pipeline.stage.folder import WORK_FOLDER, finished_units
from capgap.pipeline.stage.identity import first_difference, identity_of
from capgap.pipeline.stage.manifests import Finished, finished_stage, read_manifest, read_work_order
from capgap.pipeline.store.quarantine import read_quarantine
from capgap.pipeline.workflow.graph import decisive_settings, further_caches, implied_inputs, input_names, instances
from capgap.pipeline.workflow.sources import changed_source
from capgap.schemas.manifest import InputEntry, Manifest, WorkOrder
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
