"""Several worker processes on this machine, which end with this process and whose errors are raised in it.

They are spawned, not forked, because tokenizers and Arrow have threads, which no fork survives.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from capgap.pipeline.stage.orphans import die_with
from capgap.schemas.errors import MachineError

_TICK_S = 0.5


def run_in_processes(
    work: Callable[..., None], arguments: tuple[Any, ...], num_processes: int, tick: Callable[[], None], setting: str
) -> None:
    """Call `work(*arguments)` in `num_processes` processes, and return when all have returned.

    Args:
        work: A function at the top level of a module; it and its arguments are sent to the processes.
        arguments: Arguments of the function.
        num_processes: Number of processes.
        tick: Called about twice a second meanwhile.
        setting: Name of the setting that asks for the processes, for errors.

    Raises:
        MachineError: A process was killed.
        RuntimeError: A process raised an error that cannot be sent to this one; the message has its type and text.
        Exception: Whatever else one of the processes raised; the others are killed.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, SpawnProcess] = {}
    try:
        for _ in range(num_processes):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, os.getpid(), work, arguments), daemon=True)
            process.start()
            sender.close()
            running[receiver] = process
        while running:
            ready = wait(list(running), timeout=_TICK_S)
            tick()
            for receiver in [one for one in running if one in ready]:
                _require_well(receiver, running[receiver], setting)
                running.pop(receiver).join()
    finally:
        for process in running.values():
            process.kill()


def _require_well(receiver: Connection, process: SpawnProcess, setting: str) -> None:
    """Raise the error that the process reports, or a MachineError if it was killed before it could report anything."""
    try:
        text = receiver.recv()
    except EOFError:
        process.join()
        raise MachineError(
            "a process was killed",
            where=setting,
            found=f"signal {-(process.exitcode or 0)}" if (process.exitcode or 0) < 0 else f"exit {process.exitcode}",
            fix="see whether the machine's memory was short; run the same command again to go on",
        ) from None
    if text is not None:
        raise _error(receiver, text)


def _error(receiver: Connection, text: str) -> Exception:
    """Return the error that follows its text, or a RuntimeError with the text if the error could not be sent."""
    try:
        error: Exception = receiver.recv()
    except Exception:
        return RuntimeError(text)
    return error


def _child(sender: Connection, parent_pid: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    die_with(parent_pid)
    # the parent receives the interrupt too, and kills this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(*arguments)
        sender.send(None)
    except Exception as error:
        # The text goes first, because not every error can be sent.
        sender.send(f"{type(error).__name__}: {error}")
        with suppress(Exception):
            sender.send(error)
