"""Walk the graph of a run: each instance in a process of its own, in order; the manifests are the only truth.

states --> what would be replaced? refused, unless it is named --> for each instance: current, or made

Several drivers may be at one folder. Each hands its stages a file of its own with every setting, so that none of them
goes on with the settings of another.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

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
"""Every setting with which stages of the run were made last, for people: no stage reads it."""

Log = Callable[[str, str], None]
"""Receives the name of an instance, and why it is made again, or `current`."""

Start = Callable[[Sequence[str]], int]
"""Runs `capgap` with these arguments in a process of its own, to its end; its exit code, or minus the signal's."""

# 128 + n is the shell's word for a process that signal n has ended, and 130 is what a stage says after Ctrl-C.
_SIGNALLED, _INTERRUPTED = 128, 130


class StageFailedError(CapgapError):
    """A stage's process failed; carries its exit code, and says nothing more where the process has said why."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(
            f"{name} failed", found=_how_it_ended(code), fix="mend the cause and run the same command again"
        )
        # a signal as shells tell it
        self.exit_code = code if code > 0 else _SIGNALLED - code
        self.already_said = 0 < code < _SIGNALLED or code == _INTERRUPTED


def start_afresh(arguments: Sequence[str]) -> int:
    """As `Start`, in a fresh Python."""
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
        run: the run file.
        chosen: instances to bring up to date; what they read and is not chosen must be current already.
        log: receives the name of each instance, and why it is made again, or `current`.
        remake: stages, or instances by name, that are made again even if they are current. Nothing else that has cost
            device time is replaced.
        force: make all that is chosen again.
        replace: replace what has cost device time where its settings have changed, named or not, and begin anew what
            was begun under others.
        wait: wait for a device that another stage holds.
        start: starts the process of a stage.
        command: how the run was started, which is remembered beside it, once something is made or all is current.
        require: one more check, of the instances that are to be made, before anything is.

    Raises:
        SettingError: a name in `remake` names none of the chosen instances.
        MismatchError: something that cost device time would be replaced, or was begun under other settings, and
            `remake` does not name it.
        StageFailedError: a stage's process failed; later ones were not started.
        InputError, CorruptError: as `RunStates`.
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
                # an input may have come out otherwise than the manifests foretold
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
        # all of the run is as these flags would have made it
        write_command(out, command)
    return made


def _is_at_work(folder: Path) -> bool:
    """Whether a process is at it, so that a stage which starts there now will be refused."""
    return any(is_alive(beat) for beat in read_heartbeats(folder / WORK_FOLDER))


def _write_down(run: RunFile, command: LastCommand | None) -> None:
    """Say in the run's folder with which settings its stages are made from here on, and how they were given."""
    if command is not None:
        write_command(Path(run.out), command)
    write_atomically(Path(run.out) / RESOLVED_NAME, run.model_dump_json(indent=1))


def _tidy(folder: Path) -> None:
    """Remove what a stage left that was killed just after its manifest, unless somebody is at work there."""
    if (folder / WORK_FOLDER).is_dir():
        with contextlib.suppress(MachineError), locked_folder(folder):
            pass


def _arguments(settings: Path, instance: Instance, remake: bool, wait: bool) -> list[str]:
    arguments = [instance.stage, "--config", str(settings), "--instance", instance.name]
    arguments += ["--force"] if remake else []
    return arguments if wait else [*arguments, "--no-wait"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONSAFEPATH": "1", "CAPGAP_DRIVER_PID": str(os.getpid())}


def _how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
