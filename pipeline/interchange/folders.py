"""Finished folders that no run file's stage made, with work order, manifest, locks and heartbeat like a stage's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from capgap.pipeline.stage.context import StageInput, StageResult
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.finish import Clock, finish_with
from capgap.pipeline.stage.folder import WORK_FOLDER, begin, clear, locked_folder
from capgap.pipeline.stage.heartbeat import heartbeat
from capgap.pipeline.stage.identity import first_difference, identity_of
from capgap.pipeline.stage.manifests import read_manifest, read_work_order, require_seal
from capgap.schemas.errors import MismatchError
from capgap.schemas.manifest import InputEntry, Manifest, SourceEntry, WorkOrder


def order_for(stage: str, settings: dict[str, Any], inputs: dict[str, InputEntry]) -> WorkOrder:
    """Return a work order whose identity is that of a stage with these settings and inputs."""
    identity = identity_of(stage, settings, {name: entry.identity for name, entry in inputs.items()})
    return WorkOrder(stage=stage, instance=stage, settings=settings, inputs=inputs, identity=identity)


def entry_of(folder: Path, manifest: Manifest) -> InputEntry:
    """Return a finished folder as an entry in the inputs of a work order."""
    return InputEntry(path=str(folder), identity=manifest.identity, content=manifest.content)


def make_folder(
    folder: Path,
    order: WorkOrder,
    sources: tuple[SourceEntry, ...],
    resolved: dict[str, Any],
    work: Callable[[Path], StageResult],
    force: bool,
) -> StageInput:
    """Make or continue a folder and return it finished; one that already holds what the order asks for is kept.

    Args:
        folder: Folder of the stage.
        order: Work order of the folder.
        sources: Files that are read.
        resolved: Settings with their defaults, for the manifest.
        work: Makes the files, and may find what an earlier, killed process finished.
        force: Whether to make the folder anew, whatever it holds.

    Raises:
        MismatchError: The folder holds something else.
        MachineError: Another process works on the folder.
        CapgapError: Whatever `work` raises.
    """
    clock = Clock()
    with locked_folder(folder):
        manifest = read_manifest(folder)
        if manifest is not None and not force and _holds(folder, manifest, order):
            require_seal(folder, manifest)
            event("stage_current", f"{order.instance} is current: nothing to do")
            return StageInput(folder, manifest)
        if force:
            clear(folder)
        else:
            _require_ours(folder, manifest, order)
            if manifest is not None:
                clear(folder)
        order = order.model_copy(update={"sources": sources})
        begin(folder, order)
        clock.begin()
        with heartbeat(folder / WORK_FOLDER):
            return StageInput(folder, finish_with(folder, order, work(folder), resolved, clock))


def _holds(folder: Path, manifest: Manifest, order: WorkOrder) -> bool:
    """Return whether the folder was made by the same order from the same inputs, and every file has its size."""
    return (
        manifest.identity == order.identity
        and all(manifest.inputs[name].content == entry.content for name, entry in order.inputs.items())
        and all(_is_there(folder / file.path, file.num_bytes) for file in manifest.files)
    )


def _is_there(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _require_ours(folder: Path, manifest: Manifest | None, order: WorkOrder) -> None:
    """Raise MismatchError if the folder was made or begun by another order, so that no other work is thrown away."""
    there = manifest if manifest is not None else read_work_order(folder)
    if there is None or there.identity == order.identity:
        return
    changed = first_difference(there.settings, order.settings)
    found = "other inputs" if changed is None else f"{changed[0]} was {changed[1]!r}, is {changed[2]!r}"
    raise MismatchError(
        f"the folder holds another {there.stage}",
        where=folder,
        found=found,
        fix="name another folder with --out, or make it anew with --force",
    )
