"""Several separate processes that work on one folder: each makes some of its units, and one writes the manifest.

    begin, in turn:   the first clears the folder, if it must, and writes work.json with the sources; the others find it
    work, at once:    each unit is made by one process at a time; all share `.lock`, which shuts out ordinary runs
    finish, in turn:  the first that finds every unit finished writes the manifest; the others find that file

`.turn` is the lock of the process that begins or finishes. Every lock ends with its process.
"""

from __future__ import annotations

import contextlib

from capgap.pipeline.stage.context import Instance, Slice, StageContext, StageInput
from capgap.pipeline.stage.device import devices_from, resolve_device
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.finish import Clock, finish_with
from capgap.pipeline.stage.folder import (
    LOCK_NAME,
    TURN_NAME,
    WORK_FOLDER,
    begin,
    finished_units,
    in_use,
    make_folder,
    write_order,
)
from capgap.pipeline.stage.heartbeat import heartbeat, require_nobody_elsewhere
from capgap.pipeline.stage.lease import leases
from capgap.pipeline.stage.manifests import with_digests
from capgap.pipeline.stage.seconds import add_seconds
from capgap.pipeline.stages import stage_named
from capgap.pipeline.store.locks import ProcessLock, held_alone
from capgap.pipeline.workflow.carry_out import make_ready, order_of, with_sources
from capgap.pipeline.workflow.state import RunStates, StageState, State
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.manifest import Manifest, WorkOrder
from capgap.schemas.run_file import RunFile

# All slices wait while the first one computes the digests of the sources, so those of larger ones are left for the end.
_MOST_BYTES = 1 << 30


def carry_out_slice(run: RunFile, instance: Instance, part: Slice, *, wait: bool = True) -> Manifest | None:
    """Make a slice of the instance's units; return the manifest where all units are made, else None.

    Raises:
        SettingError: The settings ask for replicas too.
        MachineError: An ordinary run holds the folder, or other slices must end before it can be begun anew.
        MismatchError: The folder was begun under other settings or from other sources and is not finished.
        CapgapError: Whatever the stage raises.
    """
    stage = stage_named(instance.stage)
    engines = stage.engines(run)
    if engines.replicas > 1:
        raise SettingError(
            "a slice is one engine",
            where=f"{stage.section}.replicas",
            found=engines.replicas,
            expected="1 with --slice",
        )
    clock = Clock()
    known = RunStates(run)
    inputs = known.inputs_of(instance)
    stage.check(run, instance, inputs)
    state = known.of(instance.name)
    make_folder(state.folder)
    slices = stage.slices()
    device = resolve_device(run.device) if stage.on_device else "cpu"
    holder = f"{instance.name} of run {run.name}"
    context = StageContext(run, instance, state.folder, inputs, device, holder, wait)
    with ProcessLock(state.folder / LOCK_NAME) as lock:
        with held_alone(state.folder / TURN_NAME):
            order = _join(run, instance, inputs, lock)
            if isinstance(order, Manifest):
                return order
            job = slices.prepare(context)
        # on GPUs each slice has one of its own; on CPUs the slices share the device
        group = str(state.folder.resolve()) if device == "cpu" else ""
        with contextlib.ExitStack() as stack:
            beat = stack.enter_context(heartbeat(state.folder / WORK_FOLDER, shared=True))
            if stage.on_device:
                stack.enter_context(leases(devices_from(device, engines.num_devices), holder, wait, group))
            clock.begin()
            beat.begin_phase(f"slice {part}", device)
            event("stage_started", f"{instance.name}: slice {part} begun on {device}", device=device, slice=str(part))
            slices.make_slice(job, part)
            if not job.units.all_made():
                done = f"{finished_units(state.folder / WORK_FOLDER)} finished"
                event("slice_done", f"{instance.name}: {done}; other slices have the rest to do", slice=str(part))
                with held_alone(state.folder / TURN_NAME):
                    beat.leave()
                    # another process may have finished the stage meanwhile, and counted this one by its heartbeat
                    if (state.folder / WORK_FOLDER).is_dir():
                        add_seconds(state.folder / WORK_FOLDER, clock.wall_s)
                return None
            # stopped, because the first process to finish removes the folder of the heartbeats
            beat.stop()
            with held_alone(state.folder / TURN_NAME):
                if (found := _finished(run, instance)) is not None:
                    return found
                result = stage.run(context)
                order = order.model_copy(update={"sources": with_digests(order.sources)})
                write_order(state.folder, order)
                return finish_with(state.folder, order, result, run.model_dump(mode="json"), clock)


def _join(run: RunFile, instance: Instance, inputs: dict[str, StageInput], lock: ProcessLock) -> WorkOrder | Manifest:
    """Begin the folder or join the slices at work, and share its lock; return the manifest if it is finished."""
    if (found := _finished(run, instance)) is not None:
        return found
    alone = lock.exclusive()
    state = RunStates(run).of(instance.name)
    order = order_of(state, inputs)
    if alone:
        require_nobody_elsewhere(state.folder / WORK_FOLDER)
        make_ready(run, state, remake=False)
        begin(state.folder, order)
        with heartbeat(state.folder / WORK_FOLDER, shared=True):
            order = with_sources(run, state, order, _MOST_BYTES)
    if not lock.shared():
        raise in_use(state.folder)
    if not alone:
        _require_joinable(state)
    return order


def _finished(run: RunFile, instance: Instance) -> Manifest | None:
    state = RunStates(run).of(instance.name)
    if state.state is not State.CURRENT or state.manifest is None:
        return None
    event("stage_current", f"{instance.name} is current: nothing to do")
    return state.manifest


def _require_joinable(state: StageState) -> None:
    if state.state is not State.PARTIAL:
        raise in_use(state.folder)
    if state.begun_otherwise:
        raise MismatchError(
            "other slices are at work under other settings or on other sources",
            where=state.folder,
            found=state.begun_otherwise,
            fix="give every slice the same settings and sources",
        )
