"""How a stage declares itself: one small object in its own folder, from which everything else is derived.

    pipeline/<stage>/declaration.py: STAGE = Stage(...)
        --> graph (instances, inputs, order), identities (settings, sources), leases (on_device), help, status, plan

A declaration imports nothing heavy, because `capgap status` reads it and needs no torch. The work itself is in the
module that `code` names, which is imported only when the stage runs.
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
    """Return no path, for a stage that reads nothing outside the run."""
    return []


def no_further(run: RunFile, instance: Instance) -> dict[str, str]:
    """Return no entry, for a stage that reads no finished stage of another run beside those that are reused."""
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
    """How many engines a stage starts, and on how many devices.

    Attributes:
        replicas: Number of engines that run at once, each in its own process and on its own devices.
        num_devices: Number of devices of each engine; 0 where its model is served elsewhere.
    """

    replicas: int = 1
    num_devices: int = 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage as the rest of the pipeline knows it.

    Attributes:
        name: Name of the stage, of its folder in the run's folder, and of its command.
        help: One line that says what the stage does.
        code: Full name of the module that does the work. It has `run(context)`, and may have
            `check(run, instance, inputs)` and `reopen(folder, manifest)`.
        section: Section of the run file that holds the stage's settings.
        settings_type: Model of that section, where the run file does not define it itself.
        instances: Returns the instances of the stage in a run; none where the run file does not ask for the stage.
        inputs: Returns the names of the instances that an instance reads, among them earlier ones of the same stage.
        roles: Returns the role of each input, by its name, where the role differs from the name: a training in a run
            with rounds reads the cache of its round in the role `cache`.
        settings: Returns the settings that decide the result: equal settings and equal inputs give an equal result.
        sources: Returns the files outside the run that an instance reads.
        further: Returns the finished caches of other runs that an instance reads: folder or URL, by name of the input.
        on_device: Whether the stage puts a model on a device, and so needs a lease.
        is_costly: Returns whether a finished instance cost so much device time that it is replaced only when the user
            asks for that by name.
        engines: Returns how many engines the stage starts, and on how many devices each.
        training: Returns the training settings of an instance; None for an instance that trains nothing.
        may_skip_quarantined: Returns whether an instance may read an input that lacks only quarantined shards.
        is_sliced: Whether several separate processes can share the work, with the module `slices` beside `code`.
        preflight: Check that runs before anything of the run is made, as `module:function`; called with the run.
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
        """Do the work of the stage and return its result."""
        result: StageResult = self._module().run(context)
        return result

    def check(self, run: RunFile, instance: Instance, inputs: Mapping[str, StageInput]) -> None:
        """Refuse settings and inputs that can be seen to be wrong without doing any work.

        Raises:
            CapgapError: Whatever the stage's own `check` raises.
        """
        check = getattr(self._module(), "check", None)
        if check is not None:
            check(run, instance, inputs)

    def reopen(self, folder: Path, manifest: Manifest) -> bool:
        """Reopen a finished folder that has lost files; return False where the stage has to be made anew."""
        reopen = getattr(self._module(), "reopen", None)
        return reopen is not None and bool(reopen(folder, manifest))

    def slices(self) -> Any:
        """Return the stage's module `slices`, by which several processes share the work."""
        assert self.is_sliced, self.name
        return importlib.import_module(f"{self.code.rpartition('.')[0]}.slices")

    def require_possible(self, run: RunFile) -> None:
        """Run the stage's preflight check, before anything of the run is made.

        Raises:
            CapgapError: Whatever the stage's own `preflight` raises.
        """
        if self.preflight is not None:
            module, _, function = self.preflight.partition(":")
            getattr(importlib.import_module(module), function)(run)

    def _module(self) -> Any:
        with interrupts_heard():
            return importlib.import_module(self.code)
