"""Carry out one instance of a stage in this process."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping

from capgap.pipeline.stage.command import typed_command
from capgap.pipeline.stage.context import Instance, StageContext, StageInput, StageResult
from capgap.pipeline.stage.device import devices_from, resolve_device
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.finish import Clock, finish_with
from capgap.pipeline.stage.folder import WORK_FOLDER, begin, clear, is_untouched, locked_folder, write_order
from capgap.pipeline.stage.heartbeat import begin_phase, heartbeat
from capgap.pipeline.stage.lease import cpu_group, leases
from capgap.pipeline.stage.manifests import record_sources
from capgap.pipeline.stage.ranks import Ranks, Rendezvous
from capgap.pipeline.stage.seconds import add_seconds
from capgap.pipeline.stage.versions import note_versions
from capgap.pipeline.stages import stage_named
from capgap.pipeline.workflow.sources import source_paths
from capgap.pipeline.workflow.state import RunStates, StageState, State
from capgap.schemas.errors import MismatchError
from capgap.schemas.manifest import InputEntry, Manifest, WorkOrder
from capgap.schemas.run_file import RunFile


def carry_out(
    run: RunFile, instance: Instance, *, remake: bool = False, wait: bool = True, rendezvous: Rendezvous | None = None
) -> Manifest:
    """Make the instance's folder current and return its manifest.

    A finished folder of the same identity is left alone unless `remake` is set. Without `remake`, one of another
    identity is not replaced if it cost device time. An unfinished folder is continued. Other ranks that work on the
    folder learn at the rendezvous whether it was begun.

    Raises:
        InputError: An input is not current.
        MismatchError: The folder was begun under other settings or from other sources and is not finished, or is
            finished and costly.
        CapgapError: Whatever the stage raises.
    """
    clock = Clock()
    known = RunStates(run)
    inputs = known.inputs_of(instance)
    with locked_folder(known.of(instance.name).folder):
        # the state is read again under the lock, because another process may have finished the folder meanwhile
        known.forget(instance.name)
        state = known.of(instance.name)
        if state.state is State.CURRENT and not remake and state.manifest is not None:
            event("stage_current", f"{instance.name} is current: nothing to do")
            _publish_begun(rendezvous, False)
            return state.manifest
        stage_named(instance.stage).check(run, instance, inputs)
        make_ready(run, state, remake)
        order = order_of(state, inputs)
        begin(state.folder, order)
        clock.begin()
        with heartbeat(state.folder / WORK_FOLDER):
            order = with_sources(run, state, order)
            _publish_begun(rendezvous, True)
            result = work(run, state, inputs, wait, rendezvous)
            return finish_with(state.folder, order, result, run.model_dump(mode="json"), clock)


def order_of(state: StageState, inputs: Mapping[str, StageInput]) -> WorkOrder:
    """Return the work order with the inputs as they were found."""
    entries = {
        name: InputEntry(path=str(i.location), identity=i.manifest.identity, content=i.manifest.content)
        for name, i in inputs.items()
    }
    return state.order.model_copy(update={"inputs": entries})


def with_sources(run: RunFile, state: StageState, order: WorkOrder, most_bytes: float = math.inf) -> WorkOrder:
    """Record the sources in the work order of a folder that was begun, before any work, and return the order.

    The digests of a folder that is continued are kept, so that a large source is not read again. Of sources of more
    than `most_bytes` in all, no digest is computed.
    """
    paths = source_paths(run, state.instance)
    digests = sum(path.stat().st_size for path in paths) <= most_bytes
    sources = record_sources(paths, order.sources, digests)
    order = order.model_copy(update={"sources": sources})
    write_order(state.folder, order)
    return order


def make_ready(run: RunFile, state: StageState, remake: bool) -> None:
    """Empty a folder that holds another result, or open it again where it only lost files.

    The caller holds the folder's lock. A folder begun under other settings or from other sources that has no finished
    unit is emptied.

    Raises:
        MismatchError: The folder is unfinished, has finished units, and was begun under other settings or from other
            sources; or it is finished, cost device time, and would be replaced without `remake`.
    """
    stage = stage_named(state.instance.stage)
    if not remake and state.lost and state.manifest is not None and stage.reopen(state.folder, state.manifest):
        made = (*state.manifest.earlier_versions, state.manifest.versions)
        note_versions(state.folder / WORK_FOLDER, state.instance.name, made)
        add_seconds(state.folder / WORK_FOLDER, state.manifest.wall_s)
        return
    is_kept = state.manifest is not None and stage.is_costly(run, state.instance)
    if is_kept and state.replaced and not remake:
        raise MismatchError(
            "this stage is finished and would be replaced",
            where=state.folder,
            found=state.replaced,
            fix=f"restore the setting or source, or replace it with --remake {state.instance.name}",
        )
    if remake or state.state is State.STALE:
        clear(state.folder)
    elif state.begun_otherwise and is_untouched(state.folder):
        # a first attempt may have failed over a setting or a source that has been corrected since
        clear(state.folder)
    elif state.begun_otherwise:
        raise MismatchError(
            "this stage is unfinished and was begun under other settings or from other sources",
            where=state.folder,
            found=state.begun_otherwise,
            fix=f"restore what changed to continue, or start over with --remake {state.instance.name}",
        )


def work(
    run: RunFile, state: StageState, inputs: dict[str, StageInput], wait: bool, rendezvous: Rendezvous | None = None
) -> StageResult:
    """Run the stage itself, on its devices, in a folder that was begun.

    Where several processes work on it, the first one on each machine holds the leases of that machine's devices.
    """
    stage, ranks = stage_named(state.instance.stage), Ranks() if rendezvous is None else rendezvous.ranks
    with contextlib.ExitStack() as stack:
        device, holder, group = "cpu", f"{state.instance.name} of run {run.name}", ""
        if stage.on_device:
            device, engines = resolve_device(run.device), stage.engines(run)
            group = cpu_group() if device == "cpu" else ""
            if engines.replicas > 1 and device == "cpu":
                # a new group, shared with no other process, so that replicas which a killed stage left are waited for
                group = f"{os.uname().nodename} {os.getpid()} {time.monotonic_ns()}"
            is_training = stage.training(run, state.instance) is not None
            devices = devices_from(device, ranks.local_size if is_training else engines.num_devices)
            begin_phase("waits for its device")
            # replicas on GPUs each take the lease on their own GPU, which Ray picks and this process does not know
            if (engines.replicas == 1 or device == "cpu") and ranks.local_rank == 0:
                stack.enter_context(leases(devices, holder, wait, group))
            if rendezvous is not None:
                device = devices[ranks.local_rank % len(devices)]
                stack.enter_context(_on_leased_devices(rendezvous, device))
        event("stage_started", f"{state.instance.name}: begun on {device}", device=device, command=typed_command())
        begin_phase("imports its packages and reads its inputs", device if stage.on_device else "")
        (state.folder / WORK_FOLDER).mkdir(exist_ok=True)
        return stage.run(StageContext(run, state.instance, state.folder, inputs, device, holder, wait, group, ranks))


@contextlib.contextmanager
def _on_leased_devices(rendezvous: Rendezvous, device: str) -> Iterator[None]:
    """Open the group of all ranks once every machine's devices are leased."""
    leased = f"leased on machine {rendezvous.ranks.node}"
    if rendezvous.ranks.local_rank == 0:
        rendezvous.publish(leased)
    else:
        rendezvous.wait_for(leased)
    with rendezvous.group(device):
        yield


def _publish_begun(rendezvous: Rendezvous | None, begun: bool) -> None:
    if rendezvous is not None:
        rendezvous.publish("begun", begun)
