"""The `capgap` command: it sets up the logs, runs the named command, and reports an error in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from capgap.jobs.faults import CRASHED, INTERRUPTED, READER_GONE, named
from capgap.jobs.logs import log_crash, log_error, log_interrupted, set_up_logs
from capgap.jobs.process import die_with_driver
from capgap.jobs.registry import COMMANDS, Command, first_words, overview
from capgap.jobs.shipped import shipped_names
from capgap.jobs.streams import redacted_streams
from capgap.jobs.typed import refuse_credentials
from capgap.schemas.errors import CapgapError, SettingError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the arguments after `capgap`; None for those of this process.

    Returns:
        0 success, 1 a bug in capgap, 2 an error that the user can correct, 3 a fault of the machine, 4 damaged data,
        5 runs of a grid have no result, 130 interrupted, 141 the reader of the output is gone, 128 + n a stage was
        killed by signal n.
    """
    with redacted_streams():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    # Set before the commands import torch: OpenMP threads that spin while they wait cost up to 90 % of the speed on a
    # machine with other work, and gain about 13 % on an idle one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # hides notices at torch's start that users cannot act on
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    die_with_driver()
    try:
        set_up_logs(arguments)
        code = _dispatch(arguments)
        # flush here, so that a closed pipe is handled below and not at the exit of Python
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        log_interrupted(INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        # as in `capgap status RUN.yaml | head -1`; the rest of the buffer goes to /dev/null, or Python's exit fails
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except Exception as error:
        fault = named(error)
        if fault is None:
            log_crash(error, CRASHED)
            return CRASHED
        if not fault.already_said:
            log_error(fault)
        return fault.exit_code


def _dispatch(arguments: list[str]) -> int:
    refuse_credentials(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    if arguments[0] in ("--version", "version"):
        import capgap

        print(f"capgap {capgap.__version__}")
        return 0
    if arguments[0] == "law" and (len(arguments) == 1 or arguments[1] in ("-h", "--help", "help")):
        print(overview("law "))
        return 0
    command, rest = _command(arguments)
    asked = next((number for number, word in enumerate(rest) if word in ("-h", "--help")), None)
    if asked is not None:
        from capgap.jobs.help import help_text

        topics = [word for word in rest[asked + 1 : asked + 2] if not word.startswith("-")]
        print(help_text(command.parser(), topics[0] if topics else None))
        return 0
    # must be called before torch or numpy allocates memory
    from capgap.pipeline.store.memory import keep_freed_memory

    keep_freed_memory()
    return command.run(rest)


def _command(arguments: list[str]) -> tuple[Command, list[str]]:
    """Return the command that the arguments name, and the arguments after its name."""
    for words in (2, 1):
        if (command := COMMANDS.get(" ".join(arguments[:words]))) is not None:
            return command, arguments[words:]
    first = arguments[0]
    if first == "law":
        names = ", ".join(name.removeprefix("law ") for name in COMMANDS if name.startswith("law "))
        raise SettingError("no such command", where="capgap law", found=arguments[1], expected=f"one of {names}")
    from capgap.jobs.suggest import command_like, did_you_mean

    if Path(first).is_file() or first.endswith((".yaml", ".yml")) or first in shipped_names():
        raise CapgapError("no command is named", found=first, fix=f"did you mean capgap run {first}?")
    meant = command_like(first, first_words())
    fix = did_you_mean([f"capgap {meant}"] if meant else []) or "`capgap --help` lists the commands"
    raise CapgapError("no such command", found=first, fix=fix)


if __name__ == "__main__":
    sys.exit(main())
