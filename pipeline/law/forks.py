"""Stages as forks of a process that has imported what they need.

A grid is hundreds of short stages, and the import of torch, transformers and Lightning takes longer than many of them.
Each is a process of its own all the same, and its memory is gone when it ends. For CPUs only: CUDA does not outlive a
fork, and vLLM starts processes of its own.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from capgap.pipeline.workflow.driver import Start

_HEAVY = (
    "lightning",
    "torch",
    "transformers.models.llama.modeling_llama",
    "capgap.pipeline.cache.transformers_engine",
    *(f"capgap.pipeline.{stage}.stage" for stage in ("teacher", "cache", "student", "train", "eval")),
)


# how a process ends whose command could not even log what went wrong
_CRASHED = 1


def prepare() -> None:
    """Import what the stages need, once for all of them."""
    for name in _HEAVY:
        importlib.import_module(name)


def starter(main: Callable[[Sequence[str]], int]) -> Start:
    """What runs `main`, the command line, with arguments in a fork of one thread, to its end.

    It returns the exit code, or minus the number of the signal that ended the fork.
    """
    return lambda arguments: _start(main, arguments)


def _start(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_the_command(main, list(arguments), parent)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def _be_the_command(main: Callable[[Sequence[str]], int], arguments: list[str], parent: int) -> NoReturn:
    code = _CRASHED
    try:
        import torch

        # the environment that says so was read when torch was imported
        torch.set_num_threads(1)
        os.environ.update(PYTHONSAFEPATH="1", CAPGAP_DRIVER_PID=str(parent))
        sys.argv = ["capgap", *arguments]
        code = main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
