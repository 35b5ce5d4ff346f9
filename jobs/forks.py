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
from collections.abc import Sequence
from typing import NoReturn

from capgap.jobs.faults import CRASHED

_HEAVY = (
    "lightning",
    "torch",
    "transformers.models.llama.modeling_llama",
    "capgap.jobs.commands",
    "capgap.pipeline.cache.transformers_engine",
    *(f"capgap.pipeline.{stage}.stage" for stage in ("teacher", "cache", "student", "train", "eval")),
)


def prepare() -> None:
    """Import what the stages need, once for all of them."""
    for name in _HEAVY:
        importlib.import_module(name)


def start(arguments: Sequence[str]) -> int:
    """Run `capgap` with these arguments in a fork of one thread, to its end; its exit code, or minus the signal's."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _be_the_command(list(arguments), parent)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def _be_the_command(arguments: list[str], parent: int) -> NoReturn:
    code = CRASHED
    try:
        import torch

        from capgap.jobs.cli import main

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
