"""A process that has imported what the command imports, and forks one real `capgap` per line of its input.

    {"argv": [...], "log": PATH}  -->  child: its own session, the command's own `main`, output in the log
    stdout                        <--  the child's pid; when it has ended, how, as `subprocess` says it

An import of torch, transformers and Lightning takes seconds; the fork takes milliseconds, so that a hundred real
processes can be killed in the time of ten. Nothing but imports happens before the fork, and no thread is running.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import lightning
import pyarrow.ipc
import pyarrow.parquet
import torch
import transformers

from capgap.jobs.cli import main
from capgap.jobs.registry import COMMANDS
from capgap.pipeline.stages import declared

HEAVY = (lightning, pyarrow, torch, transformers, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast)


def serve() -> None:
    """Fork a child per line until the input ends."""
    for stage in [stage.name for stage in declared()]:
        importlib.import_module(f"capgap.pipeline.{stage}.stage")
    for command in COMMANDS.values():
        command.parser()
    importlib.import_module("capgap.pipeline.cache.transformers_engine")
    # Arrow's allocator, which is made for forks, has a thread of its own; any other could leave a lock taken for ever
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, f"threads before a fork: {threads}"
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _be_the_command(order["argv"], Path(order["log"]))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _be_the_command(argv: list[str], log: Path) -> None:
    code = 1
    try:
        os.setsid()
        with log.open("wb") as file, open(os.devnull, "rb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["capgap", *argv]
        code = main(argv)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
