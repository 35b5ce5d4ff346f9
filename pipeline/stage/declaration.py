"""How a stage declares itself: one small object in its own folder, from which all else is derived.

    pipeline/<stage>/declaration.py: STAGE = Stage(...)
        --> graph (instances, inputs, order), identities (settings, sources), leases (on_device), help, status, plan

A declaration imports nothing heavy: whoever asks how a run stands reads it, and torch is not needed for that. The work
itself is in the module that `code` names, which is imported when the stage is carried out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.interrupts import interrupts_heard
from capgap.schemas.base import Record
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_optimization import OptimizationSettings


def no_sources(run: RunFile, instance: Instance) -> list[Path]:
    """Nothing outside the run is read."""
    return []


def no_further(run: RunFile, instance: Instance) -> dict[str, str]:
    """No finished stage of another run is read beside those that are reused."""
    return {}


def _trains_nothing(run: RunFile, instance: Instance) -> None:
    return None


def _one_engine(run: RunFile) -> Engines:
    return Engines()


def _costs_little(run: RunFile, instance: Instance) -> bool:
    return False


def _reads_whole_inputs(run: RunFile, instance: Instance) -> bool:
    return False


@dataclass(frozen=True)
class Engines:
    """How a stage takes devices.

    Attributes:
        replicas: engines side by side, each in a process and on devices of its own.
        num_devices: devices that one of them takes; 0 where its model is served elsewhere.
    """

    replicas: int = 1
    num_devices: int = 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as the rest of the pipeline knows it.

    Attributes:
        name: of the stage, of its folder in the run's folder, and of its command.
        help: one line that says what it does.
        code: the module that does it, by its full name: `run(context)`, and where there is something to check or to
            open again `check(run, instance, inputs)` and `reopen(folder, manifest)`.
        section: the section of the run file that holds its settings.
        settings_type: model of that section, where it is not one of the run file's own.
        instances: those that a run has; none where its file does not ask for the stage.
        inputs: names of the instances that one of them reads, which may be earlier instances of the same stage.
        roles: what an input is called among those of the instance, by its name, where that is not its name: a training
            of rounds reads the cache of its round as `cache`.
        settings: those that decide what an instance makes: equal settings and equal inputs make the same.
        sources: files outside the run that an instance reads.
        further: finished caches of other runs that an instance reads: folder or URL, by the name of the input.
        on_device: whether it puts a model on a device, and so needs the lease.
        is_costly: whether what an instance has finished cost so much device time that it is replaced only when that is
            asked for by name.
        engines: how many engines it starts, and on how many devices each.
        training: the settings of the training that an instance is; None for one that trains nothing.
        may_skip_quarantined: whether an instance may read an input that lacks only what is in quarantine.
        is_sliced: whether several plain processes can share the work, as `code`'s neighbour `slices` says.
        preflight: what can be refused before anything of the run is made, as `module:function`; called with the run.
    """

    name: str
    help: str
    code: str
    section: str
    instances: Callable[[RunFile], Sequence[Instance]]
    inputs: Callable[[RunFile, Instance], Sequence[str]]
    settings: Callable[[RunFile, Instance], Mapping[str, Any]]
    settings_type: type[Record] | None = None
    roles: Callable[[RunFile, Instance], Mapping[str, str]] = no_further
    sources: Callable[[RunFile, Instance], list[Path]] = no_sources
    further: Callable[[RunFile, Instance], dict[str, str]] = no_further
    on_device: bool = False
    is_costly: Callable[[RunFile, Instance], bool] = _costs_little
    engines: Callable[[RunFile], Engines] = _one_engine
    training: Callable[[RunFile, Instance], OptimizationSettings | None] = _trains_nothing
    may_skip_quarantined: Callable[[RunFile, Instance], bool] = _reads_whole_inputs
    is_sliced: bool = False
    preflight: str | None = None

    def run(self, context: StageContext) -> StageResult:
        """Do the work."""
        result: StageResult = self._module().run(context)
        return result

    def check(self, run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
        """Refuse what can be seen without any work.

        Raises:
            CapgapError: whatever the stage's `check` raises.
        """
        check = getattr(self._module(), "check", None)
        if check is not None:
            check(run, instance, inputs)

    def reopen(self, folder: Path, manifest: Manifest) -> bool:
        """Open a finished folder again that only lost files; False where the stage has to be made anew."""
        reopen = getattr(self._module(), "reopen", None)
        return reopen is not None and bool(reopen(folder, manifest))

    def slices(self) -> Any:
        """The module that makes slices."""
        assert self.is_sliced, self.name
        return importlib.import_module(f"{self.code.rpartition('.')[0]}.slices")

    def require_possible(self, run: RunFile) -> None:
        """Refuse what can be refused before anything of the run is made.

        Raises:
            CapgapError: whatever the stage's `preflight` raises.
        """
        if self.preflight is not None:
            module, _, function = self.preflight.partition(":")
            getattr(importlib.import_module(module), function)(run)

    def _module(self) -> Any:
        with interrupts_heard():
            return importlib.import_module(self.code)
