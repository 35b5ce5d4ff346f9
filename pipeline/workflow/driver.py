"""Walk the stage graph: order and selection by doit, each stage in a process of its own, the manifests the only truth.

doit's own record of what was done is never consulted: every task's `uptodate` is our reading of the manifests, and
its database lives in a temporary folder that is gone when the walk ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from doit.cmd_base import TaskLoader2
from doit.doit_cmd import DoitMain
from doit.exceptions import TaskFailed
from doit.task import Task, dict_to_task

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.folder import make_folder
from capgap.pipeline.store.files import write_atomically
from capgap.pipeline.workflow.graph import input_names
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import CapgapError
from capgap.schemas.run_file import RunFile

RESOLVED_NAME = "run.resolved.json"

Say = Callable[[str, str], None]

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
    # -P: the repository's folders `kernels` and `schemas` must not shadow installed packages of those names
    command = [sys.executable, "-P", "-m", "capgap.jobs.cli", *arguments]
    return subprocess.run(command, check=False, env=_environment()).returncode


def walk(
    run: RunFile, chosen: Sequence[Instance], *, force: bool, wait: bool, say: Say, start: Start = start_afresh
) -> list[str]:
    """Make the chosen instances current, in order, and return the names of those that had to be made.

    Args:
        run: the run file.
        chosen: instances to bring up to date; what they read and is not chosen must be current already.
        force: make them even if they are current.
        wait: wait for a device that another stage holds.
        say: receives the name of each stage, and why it is made again, or `current`.
        start: starts the process of a stage.

    Raises:
        StageFailedError: a stage's process failed; later ones were not started.
        InputError, CorruptError: as `states`.
    """
    states(run)
    out = Path(run.out)
    make_folder(out)
    write_atomically(out / RESOLVED_NAME, run.model_dump_json(indent=1))
    walked = _Walk(run, chosen, force, wait, say, start)
    with tempfile.TemporaryDirectory(prefix="capgap-") as scratch:
        database = str(Path(scratch) / "doit.json")
        loader = _Loader(walked, {"backend": "json", "dep_file": database, "reporter": _SilentReporter, "verbosity": 2})
        DoitMain(loader, config_filenames=()).run(["run"])
    if walked.failed is not None:
        raise walked.failed
    return walked.made


class _Walk:
    def __init__(
        self, run: RunFile, chosen: Sequence[Instance], force: bool, wait: bool, say: Say, start: Start
    ) -> None:
        self.run, self.chosen, self.force, self.wait, self.say, self.start = run, chosen, force, wait, say, start
        self.made: list[str] = []
        self.failed: CapgapError | None = None

    def tasks(self) -> Iterator[Task]:
        names = {instance.name for instance in self.chosen}
        for instance in self.chosen:
            yield dict_to_task(
                {
                    "name": instance.name,
                    "actions": [(self._make, [instance])],
                    "uptodate": [(self._is_current, [instance])],
                    "task_dep": [name for name in input_names(self.run, instance) if name in names],
                }
            )

    def _is_current(self, instance: Instance) -> bool:
        state = states(self.run)[instance.name]
        if state.state is State.CURRENT and not self.force:
            self.say(instance.name, "current")
            return True
        self.say(instance.name, state.why or "current, made again because of --force")
        return False

    def _make(self, instance: Instance) -> TaskFailed | None:
        code = self.start(self._arguments(instance))
        if code:
            self.failed = StageFailedError(instance.name, code)
            return TaskFailed(str(self.failed))
        self.made.append(instance.name)
        return None

    def _arguments(self, instance: Instance) -> list[str]:
        arguments = [instance.stage, "--config", str(Path(self.run.out) / RESOLVED_NAME), "--instance", instance.name]
        arguments += ["--force"] if self.force else []
        return arguments if self.wait else [*arguments, "--no-wait"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONSAFEPATH": "1", "CAPGAP_DRIVER_PID": str(os.getpid())}


def _how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class _Loader(TaskLoader2):
    def __init__(self, walked: _Walk, config: dict[str, Any]) -> None:
        super().__init__()
        self._walked, self._config = walked, config

    def setup(self, opt_values: object) -> None:
        pass

    def load_doit_config(self) -> dict[str, Any]:
        return self._config

    def load_tasks(self, cmd: object, pos_args: object) -> list[Task]:
        return list(self._walked.tasks())


class _SilentReporter:
    """What happens is said by the walk itself; doit reports only its own faults."""

    desc = "capgap"

    def __init__(self, outstream: object, options: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def runtime_error(self, message: str) -> None:
        """A fault of the graph itself."""
        raise AssertionError(message)

    def complete_run(self) -> None:
        """Nothing to print."""
