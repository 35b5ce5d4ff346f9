"""Runs stages as forks of a process that has already imported what they need.

A grid has hundreds of short stages, and importing torch, transformers and Lightning takes longer than many of them.
Each fork is still a process of its own, whose memory is freed when it ends. This works on CPUs only: CUDA cannot be
used in a forked process, and vLLM starts processes of its own.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from capgap.pipeline.stage.command import handed_on
from capgap.pipeline.workflow.driver import Start

_HEAVY = (
    "lightning",
    "torch",
    "transformers.models.llama.modeling_llama",
    "capgap.pipeline.cache.transformers_engine",
    *(f"capgap.pipeline.{stage}.stage" for stage in ("teacher", "cache", "student", "train", "eval")),
)


# exit code of a process whose command failed before it could log the reason
_CRASHED = 1


def prepare() -> None:
    """Import what the stages need, once for all of them."""
    for name in _HEAVY:
        importlib.import_module(name)


def starter(main: Callable[[Sequence[str]], int]) -> Start:
    """Return a function that runs the command line `main` with arguments in a fork with one thread.

    It waits for the end of the fork, and returns the exit code, or minus the number of the signal that ended the fork.
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

        # torch has read OMP_NUM_THREADS at its import in the parent, so the number of threads is set here
        torch.set_num_threads(1)
        os.environ.update(handed_on(), PYTHONSAFEPATH="1", CAPGAP_DRIVER_PID=str(parent))
        sys.argv = ["capgap", *arguments]
        code = main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
