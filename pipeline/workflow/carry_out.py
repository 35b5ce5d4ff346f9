"""Carry out one instance of a stage in this process."""

from __future__ import annotations

import contextlib
import importlib
import logging
import shlex
import sys
import time
from datetime import UTC, datetime

from capgap.pipeline.workflow.context import Instance, StageContext, StageInput, StageName, StageResult
from capgap.pipeline.workflow.device import resolve_device
from capgap.pipeline.workflow.folder import WORK_FOLDER, begin, clear, content_files, finish, lock_folder
from capgap.pipeline.workflow.identity import content_of
from capgap.pipeline.workflow.lease import lease
from capgap.pipeline.workflow.sources import record_sources, source_paths
from capgap.pipeline.workflow.state import StageState, State, read_manifest, require_seal, reused_manifests, states
from capgap.pipeline.workflow.versions import versions
from capgap.schemas.errors import InputError, MismatchError
from capgap.schemas.manifest import InputEntry, Manifest
from capgap.schemas.run_file import RunFile

_LOG = logging.getLogger("capgap")

# These put a model on a device; the others only read and write files.
_STAGES_WITH_A_MODEL: frozenset[StageName] = frozenset({"teacher", "cache", "student", "train", "eval"})


def carry_out(run: RunFile, instance: Instance, *, force: bool = False, wait: bool = True) -> Manifest:
    """Make the instance's folder current and return its manifest.

    A finished folder of the same identity is left alone unless `force` is set; an unfinished one is continued.

    Raises:
        InputError: an input is not current.
        MismatchError: the folder was begun under other settings and is not finished.
        CapgapError: whatever the stage raises.
    """
    started = time.monotonic()
    state = states(run)[instance.name]
    inputs = _open_inputs(run, state)
    lock = lock_folder(state.folder)
    try:
        state = states(run)[instance.name]
        if state.state is State.CURRENT and not force and state.manifest is not None:
            _LOG.info("%s is current: nothing to do", instance.name)
            return state.manifest
        _prepare(state, force)
        entries = {
            name: InputEntry(path=str(i.location), identity=i.manifest.identity, content=i.manifest.content)
            for name, i in inputs.items()
        }
        order = state.order.model_copy(update={"inputs": entries})
        begin(state.folder, order)
        begun_at = datetime.now(UTC).isoformat(timespec="seconds")
        sources = record_sources(source_paths(run, instance))
        result = _run_stage(run, state, inputs, wait)
        files = content_files(state.folder)
        manifest = Manifest(
            **order.model_dump(),
            content=content_of(files, sources),
            sources=sources,
            files=files,
            shard_sets=result.shard_sets,
            facts=result.facts,
            totals=result.totals,
            versions=versions(),
            started=begun_at,
            wall_s=round(time.monotonic() - started, 3),
            command=tuple(sys.argv),
            resolved=run.model_dump(mode="json"),
        )
        return finish(state.folder, manifest)
    finally:
        lock.release()


def _prepare(state: StageState, force: bool) -> None:
    if force or state.state is State.STALE:
        clear(state.folder)
    elif state.begun_otherwise:
        raise MismatchError(
            "this stage is unfinished and was begun under other settings",
            where=state.folder,
            found=state.begun_otherwise,
            fix="restore the setting to continue, or start over with --force",
        )


def _open_inputs(run: RunFile, state: StageState) -> dict[str, StageInput]:
    reused = reused_manifests(run)
    known = states(run)
    inputs = {}
    for name in state.order.inputs:
        if name in reused:
            path, manifest = reused[name]
            require_seal(path, manifest)
            inputs[name] = StageInput(path, manifest)
            continue
        upstream = known[name]
        found = read_manifest(upstream.folder)
        if upstream.state is not State.CURRENT or found is None:
            why = f" ({upstream.why})" if upstream.why else ""
            stage = upstream.instance.stage
            raise InputError(
                f"needs {name}",
                where=state.instance.name,
                found=f"{upstream.state}{why}",
                expected="current",
                fix=f"run `capgap run RUN.yaml --from {stage}`, or `capgap {stage} --config RUN.yaml` first",
            )
        require_seal(upstream.folder, found)
        inputs[name] = StageInput(upstream.folder, found)
    return inputs


def _run_stage(run: RunFile, state: StageState, inputs: dict[str, StageInput], wait: bool) -> StageResult:
    stage = state.instance.stage
    with contextlib.ExitStack() as stack:
        device = "cpu"
        if stage in _STAGES_WITH_A_MODEL:
            device = resolve_device(run.device)
            stack.enter_context(lease(device, holder=f"{state.instance.name} of run {run.name}", wait=wait))
        _LOG.debug("%s on %s: %s", state.instance.name, device, shlex.join(sys.argv))
        (state.folder / WORK_FOLDER).mkdir(exist_ok=True)
        module = importlib.import_module(f"capgap.pipeline.{stage}.stage")
        result: StageResult = module.run(StageContext(run, state.instance, state.folder, inputs, device))
        return result
