"""The state of each stage, decided from the run file and the manifests on disk, and from nothing else.

RunStates(run)            reads every manifest once, when it is asked for
  .of("train/.../seed-0") returns the state of one instance, after those of its inputs
  .forget("cache")        after the cache was made: its manifest, and the states that depend on it, are read again
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from capgap.pipeline.stage.context import CHAT_CACHE, Instance, StageInput
from capgap.pipeline.stage.folder import WORK_FOLDER, finished_units
from capgap.pipeline.stage.identity import first_difference, identity_of
from capgap.pipeline.stage.manifests import Finished, finished_stage, read_manifest, read_work_order, require_seal
from capgap.pipeline.stage.versions import changed_versions
from capgap.pipeline.stages import stage_named
from capgap.pipeline.store.quarantine import read_quarantine
from capgap.pipeline.workflow.graph import decisive_settings, further_caches, input_names, instances, roles
from capgap.pipeline.workflow.sources import changed_source
from capgap.schemas.errors import InputError
from capgap.schemas.manifest import InputEntry, Manifest, WorkOrder
from capgap.schemas.run_file import RunFile


class State(StrEnum):
    """The state of a stage."""

    CURRENT = "current"
    STALE = "stale"
    PARTIAL = "partial"
    MISSING = "missing"


@dataclass(frozen=True)
class StageState:
    """The state of one instance, and the reason for it.

    Attributes:
        instance: The instance.
        folder: Its folder, also where it does not exist yet.
        state: Its state.
        why: The reason, in words: the setting or input that changed, or how far the stage got; empty when current.
        order: The work order that `work.json` will hold; inputs that are not made yet have no content in it. Its
            sources are those of an unfinished folder that can be continued, else they are not recorded yet.
        manifest: The manifest of the folder, where there is one.
        replaced: Why a finished folder would be replaced by another result, in words: a changed setting, input or
            source; empty where it only lost files, or waits for an input that will come out the same.
        lost: Files of a finished folder that are missing, of another size or in quarantine, if nothing else is wrong.
        in_quarantine: Whether all lost files are shards in quarantine, so that a stage that may skip them can read the
            rest.
        begun_otherwise: The setting, input or source that differs from the one with which an unfinished folder was
            begun, in words; empty where the folder can be continued.
    """

    instance: Instance
    folder: Path
    state: State
    why: str
    order: WorkOrder
    manifest: Manifest | None
    replaced: str = ""
    begun_otherwise: str = ""
    lost: tuple[str, ...] = ()
    in_quarantine: bool = False

    def can_be_read(self, run: RunFile, reader: Instance) -> bool:
        """Return whether that instance may read the folder: it is current, or lacks only what the reader may skip."""
        if self.in_quarantine and stage_named(reader.stage).may_skip_quarantined(run, reader):
            return True
        return self.state is State.CURRENT


def states(run: RunFile) -> dict[str, StageState]:
    """Return the state of every instance, by name.

    Raises:
        InputError: A folder named under `reuse` or `train.caches` holds no manifest of that stage.
        CorruptError: A manifest cannot be read.
    """
    return RunStates(run).all()


def reused_manifests(run: RunFile) -> dict[str, Finished]:
    """Return location and manifest of every reused stage, by the stage's name.

    Raises:
        InputError: A folder named under `reuse` holds no manifest of that stage.
        CorruptError: Its manifest cannot be read.
    """
    return {str(stage): _finished(stage, folder, f"reuse.{stage}") for stage, folder in run.reuse.items()}


class RunStates:
    """The states of a run's instances, each determined once and then kept."""

    def __init__(self, run: RunFile) -> None:
        """Find the run's instances, and read the manifests of the reused stages.

        Raises:
            InputError: A folder named under `reuse` holds no manifest of that stage.
            CorruptError: Its manifest cannot be read.
        """
        self.run = run
        self.instances = {instance.name: instance for instance in instances(run)}
        self.reused = reused_manifests(run)
        self._further: dict[str, Finished] = {}
        self._known: dict[str, StageState] = {}

    def all(self) -> dict[str, StageState]:
        """Return the state of every instance, by name, inputs before their readers."""
        return {name: self.of(name) for name in self.instances}

    def of(self, name: str) -> StageState:
        """Return the state of one instance.

        Raises:
            InputError: A folder named under `train.caches` holds no manifest of a cache.
            CorruptError: A manifest cannot be read.
        """
        if name not in self._known:
            self._known[name] = self._look(self.instances[name])
        return self._known[name]

    def forget(self, name: str) -> None:
        """Forget the state of an instance, and of those that depend on it, so that the next call reads them again."""
        self._known.pop(name, None)
        for other in [one for one in self._known if name in input_names(self.run, self.instances[one])]:
            self.forget(other)

    def finished(self, stage: str) -> Manifest | None:
        """Return the manifest of a stage with one instance, if it is current or reused, else None."""
        if stage in self.reused:
            return self.reused[stage][1]
        if stage not in self.instances:
            return None
        state = self.of(stage)
        return state.manifest if state.state is State.CURRENT else None

    def inputs_of(self, instance: Instance) -> dict[str, StageInput]:
        """Return the finished folders that the instance reads, by role, after a check of their seals.

        Raises:
            InputError: An input is not current.
            CorruptError: A manifest differs from what was written.
        """
        found: dict[str, StageInput] = {}
        for name, role in self._read(instance).items():
            location, manifest = self._finished_input(name, instance)
            require_seal(location, manifest)
            found[role] = StageInput(location, manifest)
        return found

    def _finished_input(self, name: str, reader: Instance) -> Finished:
        if name in self.reused:
            return self.reused[name]
        if name not in self.instances:
            return self._further_input(name, further_caches(self.run, reader)[name])
        upstream = self.of(name)
        if upstream.can_be_read(self.run, reader) and upstream.manifest is not None:
            return upstream.folder, upstream.manifest
        stage = upstream.instance.stage
        raise InputError(
            f"needs {name}",
            where=reader.name,
            found=f"{upstream.state}{f' ({upstream.why})' if upstream.why else ''}",
            expected="current",
            fix=f"run `capgap run RUN.yaml --from {stage}`, or `capgap {stage} --config RUN.yaml` first",
        )

    def _further_input(self, name: str, folder: str) -> Finished:
        # kept by folder, because every arm and seed may read the same cache, of a million members
        if folder not in self._further:
            setting = "tune.cache" if name == CHAT_CACHE else f"train.{name.replace('/', '.')}"
            self._further[folder] = _finished("cache", folder, setting)
        return self._further[folder]

    def _entry(self, name: str, reader: Instance) -> InputEntry:
        if name in self.instances:
            state = self.of(name)
            content = state.manifest.content if state.manifest and state.state is State.CURRENT else ""
            return InputEntry(path=str(state.folder), identity=state.order.identity, content=content)
        location, manifest = self._finished_input(name, reader)
        return InputEntry(path=str(location), identity=manifest.identity, content=manifest.content)

    def _look(self, instance: Instance) -> StageState:
        folder = Path(self.run.out) / instance.name
        order = self._order(instance)
        manifest = read_manifest(folder)
        if manifest is not None:
            return self._look_at_finished(instance, folder, order, manifest)
        begun = read_work_order(folder)
        if begun is None:
            return StageState(instance, folder, State.MISSING, "never made", order, None)
        why = finished_units(folder / WORK_FOLDER)
        changed = _difference(begun, order)
        if changed:
            why = f"{why}, begun under other settings: {changed}"
        elif changed := self._changed_since(instance, begun):
            why = f"{why}, {changed}"
        elif upgraded := changed_versions(folder / WORK_FOLDER):
            why = f"{why}, {upgraded}"
        if not changed:
            order = order.model_copy(update={"sources": begun.sources})
        return StageState(instance, folder, State.PARTIAL, why, order, None, begun_otherwise=changed)

    def _changed_since(self, instance: Instance, begun: WorkOrder) -> str:
        """Say in words which source changed since the folder was begun; empty where none did, or none is recorded."""
        changed = changed_source(self.run, instance, begun.sources) if begun.sources else ""
        return changed and f"{changed} since this stage was begun"

    def _look_at_finished(self, instance: Instance, folder: Path, order: WorkOrder, manifest: Manifest) -> StageState:
        different = _difference(manifest, order)
        quarantined = read_quarantine(folder)
        lost = {} if different else _lost_files(folder, manifest, quarantined)
        replaced = different or changed_source(self.run, instance, manifest.sources) or self._replaced_input(instance)
        other = replaced or self._waiting(instance)
        why = different or next(iter(lost.values()), "") or other
        return StageState(
            instance,
            folder,
            State.STALE if why else State.CURRENT,
            why,
            order,
            manifest,
            replaced=replaced,
            lost=() if other else tuple(lost),
            in_quarantine=bool(lost) and not other and lost.keys() <= quarantined.keys() & _shard_files(manifest),
        )

    def _order(self, instance: Instance) -> WorkOrder:
        settings = json.loads(json.dumps(decisive_settings(self.run, instance)))
        inputs = {role: self._entry(name, instance) for name, role in self._read(instance).items()}
        identity = identity_of(instance.stage, settings, {name: entry.identity for name, entry in inputs.items()})
        return WorkOrder(
            stage=instance.stage, instance=instance.name, settings=settings, inputs=inputs, identity=identity
        )

    def _read(self, instance: Instance) -> dict[str, str]:
        """Return the name of everything that the instance reads, with its role."""
        return roles(self.run, instance) | {name: name for name in further_caches(self.run, instance)}

    def _replaced_input(self, instance: Instance) -> str:
        """Say which input is the first that would itself be replaced by another result; empty where none would."""
        for name in input_names(self.run, instance):
            if name in self.instances and self.of(name).replaced:
                return f"input {name} is {self.of(name).state}"
        return ""

    def _waiting(self, instance: Instance) -> str:
        for name in input_names(self.run, instance):
            if name in self.instances and not self.of(name).can_be_read(self.run, instance):
                return f"input {name} is {self.of(name).state}"
        return ""


def _finished(stage: str, folder: str, setting: str) -> Finished:
    expected = f"the folder of a finished {stage} stage"
    return finished_stage(stage, folder, "cannot be reused", f"{setting}: {folder}", expected)


def _difference(old: WorkOrder, new: WorkOrder) -> str:
    """Say in words why the old order would give another result than the new one; empty where it would not."""
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
        if entry.content and old.inputs[name].content != entry.content:
            return f"input {name} was made again and came out different"
    return ""


def _shard_files(manifest: Manifest) -> set[str]:
    """Return the paths of the shards, which are the only files that a reader can do without."""
    return {shard.file.path for part in manifest.shard_sets.values() for shard in part.shards}


def _lost_files(folder: Path, manifest: Manifest, quarantined: Mapping[str, str]) -> dict[str, str]:
    """Say in words what has become of each file that is missing or changed, by path."""
    lost = {}
    for file in manifest.files:
        if file.path in quarantined:
            lost[file.path] = f"{file.path} is in quarantine"
            continue
        # one system call per file, because there may be many thousands
        try:
            found = os.stat(f"{folder}/{file.path}")  # noqa: PTH116 (making a Path takes longer than the call)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            lost[file.path] = f"{file.path} is gone"
        elif found.st_size != file.num_bytes:
            lost[file.path] = f"{file.path} has {found.st_size} bytes, not {file.num_bytes}"
    return lost
