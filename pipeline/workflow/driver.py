"""Walk the graph of a run: each instance in a process of its own, in order; the manifests are the only truth.

states --> would something costly be replaced? refused, unless it is named --> for each instance: current, or made

Several drivers may work on one folder. Each writes a file of its own with every setting for its stages, so that no
stage uses the settings of another driver.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from capgap.pipeline.stage.command import handed_on
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.folder import WORK_FOLDER, locked_folder, make_folder
from capgap.pipeline.stage.heartbeat import is_alive, read_heartbeats
from capgap.pipeline.store.files import own_file, write_atomically
from capgap.pipeline.workflow.preflight import require_possible, to_be_made
from capgap.pipeline.workflow.remake import (
    EVERY_STAGE,
    LastCommand,
    is_named,
    require_named,
    require_nothing_lost,
    write_command,
)
from capgap.pipeline.workflow.state import RunStates, State
from capgap.schemas.errors import CapgapError, MachineError
from capgap.schemas.run_file import RunFile

RESOLVED_NAME = "run.resolved.json"
"""The settings with which stages of the run were made last. The file is for people: no stage reads it."""

Log = Callable[[str, str], None]
"""Receives the name of an instance, and why it is made again, or `current`."""

Start = Callable[[Sequence[str]], int]
"""Runs `capgap` with these arguments in its own process to the end; returns its exit code, or minus its signal."""

# Shells report 128 + n for a process that signal n has ended, and a stage exits with 130 after Ctrl-C.
_SIGNALLED, _INTERRUPTED = 128, 130


class StageFailedError(CapgapError):
    """A stage's process failed. The error carries its exit code, and is not shown if the process has said why."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(
            f"{name} failed", found=_how_it_ended(code), fix="mend the cause and run the same command again"
        )
        # signals are reported as shells report them
        self.exit_code = code if code > 0 else _SIGNALLED - code
        self.already_said = 0 < code < _SIGNALLED or code == _INTERRUPTED


def start_afresh(arguments: Sequence[str]) -> int:
    """Run `capgap` with these arguments in a new Python process, and return its exit code or minus its signal."""
    # -P: with -m Python would look for packages in the user's working folder first, unlike the command `capgap`
    command = [sys.executable, "-P", "-m", "capgap.jobs.cli", *arguments]
    return subprocess.run(command, check=False, env=_environment()).returncode


def walk(
    run: RunFile,
    chosen: Sequence[Instance],
    *,
    log: Log,
    remake: Collection[str] = (),
    force: bool = False,
    replace: bool = False,
    wait: bool = True,
    start: Start = start_afresh,
    command: LastCommand | None = None,
    require: Callable[[RunStates, Sequence[Instance]], None] | None = None,
) -> list[str]:
    """Make the chosen instances current, in order, and return the names of those that had to be made.

    Args:
        run: The run file.
        chosen: Instances to bring up to date. Inputs that are not chosen must be current already.
        log: Receives the name of each instance, and why it is made again, or `current`.
        remake: Stages or names of instances to make again even if they are current. Nothing else that has cost device
            time is replaced.
        force: Whether to make all chosen instances again.
        replace: Whether to replace what has cost device time where its settings have changed, even if `remake` does not
            name it, and to begin anew what was begun under other settings or from other sources.
        wait: Whether to wait for a device that another stage holds.
        start: Starts the process of a stage.
        command: Command that started the run. It is written beside the run once something is made or all is current.
        require: A further check of the instances to be made, which runs before anything is made.

    Raises:
        SettingError: A name in `remake` matches none of the chosen instances.
        MismatchError: A stage that cost device time would be replaced, or was begun under other settings or from other
            sources, and `remake` does not name it.
        StageFailedError: A stage's process failed; later stages were not started.
        InputError: A folder under `reuse` or `train.caches` holds no manifest of that stage.
        CorruptError: A manifest cannot be read.
    """
    known = RunStates(run)
    require_named(remake, chosen)
    named = EVERY_STAGE if force else frozenset(remake)
    if not replace:
        require_nothing_lost(known, chosen, named)
    coming = to_be_made(known, chosen, named)
    require_possible(run, coming)
    if require is not None:
        require(known, coming)
    out = Path(run.out)
    make_folder(out)
    made: list[str] = []
    with contextlib.ExitStack() as stack:
        settings: Path | None = None
        for instance in chosen:
            again = is_named(instance, named)
            state = known.of(instance.name)
            if state.state is State.CURRENT and not again:
                log(instance.name, "current")
                _tidy(state.folder)
                continue
            if not replace:
                # an input may have come out different from what the manifests predicted
                require_nothing_lost(known, chosen, named, [instance])
            if settings is None:
                if not _is_at_work(state.folder):
                    _write_down(run, command)
                settings = stack.enter_context(own_file(out / RESOLVED_NAME, run.model_dump_json(indent=1)))
            log(instance.name, state.why or "current, made again as asked")
            anew = again or bool(state.replaced) or (replace and bool(state.begun_otherwise))
            if code := start(_arguments(settings, instance, anew, wait)):
                raise StageFailedError(instance.name, code)
            known.forget(instance.name)
            made.append(instance.name)
    if command is not None and not made and len(chosen) == len(known.instances):
        # the whole run is current under these flags, so they are remembered
        write_command(out, command)
    return made


def _is_at_work(folder: Path) -> bool:
    """Return whether a process works on the folder, so that a stage which starts there now will be refused."""
    return any(is_alive(beat) for beat in read_heartbeats(folder / WORK_FOLDER))


def _write_down(run: RunFile, command: LastCommand | None) -> None:
    """Write into the run's folder the settings with which its stages are made from here on, and the command."""
    if command is not None:
        write_command(Path(run.out), command)
    write_atomically(Path(run.out) / RESOLVED_NAME, run.model_dump_json(indent=1))


def _tidy(folder: Path) -> None:
    """Remove the work folder that a stage left if it was killed just after its manifest, unless it is in use."""
    if (folder / WORK_FOLDER).is_dir():
        with contextlib.suppress(MachineError), locked_folder(folder):
            pass


def _arguments(settings: Path, instance: Instance, remake: bool, wait: bool) -> list[str]:
    arguments = [instance.stage, "--config", str(settings), "--instance", instance.name]
    arguments += ["--force"] if remake else []
    return arguments if wait else [*arguments, "--no-wait"]


def _environment() -> dict[str, str]:
    return {**os.environ, **handed_on(), "PYTHONSAFEPATH": "1", "CAPGAP_DRIVER_PID": str(os.getpid())}


def _how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
