"""The `capgap` command: parse, build, run, report errors in one line."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence

from capgap.jobs.process import die_with_driver
from capgap.schemas.errors import CapgapError, MachineError

Command = Callable[[Sequence[str]], int]

_HELP = """usage: capgap COMMAND [RUN.yaml] [--setting value ...]

  run       make every stage of a run file current; --only STAGE, --from STAGE, --force
  status    say of every stage whether it is current, and why not
  verify    check every file and shard below a folder against its digests; --rescore FRACTION asks the teacher too
  law       which teacher size is best for a student: fit a table of runs, its page, advice

  corpus    text into packed sequences                      (one stage of the run file)
  teacher   check or train the teacher
  cache     keep the teacher's distributions as shards
  student   the student's first weights
  train     train the student from the cache
  eval      measure teacher and students on held-out text
  report    one HTML page and one table

Every setting of the run file is also a flag: `capgap run RUN.yaml --train.learning_rate 1e-3`.
`capgap COMMAND --help` lists them. `capgap --version` says which capgap this is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 for an error that the user can mend, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("capgap").setLevel(logging.INFO)
    # before torch is imported, with the commands: threads that spin while they wait cost up to 90 % of the speed on a
    # machine that has other work, and gain about 13 % on one that has none
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # notices of torch's own start-up that nobody can act on
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    die_with_driver()
    try:
        return _dispatch(arguments)
    except CapgapError as error:
        if not error.already_said:
            print(f"capgap: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        print(f"capgap: {_machine_error(error)}", file=sys.stderr)
        return MachineError.exit_code
    except Exception as error:
        # tokenizers and safetensors write files in Rust, and report a full disk as an exception of their own
        if "(os error 28)" not in str(error):
            raise
        print(f"capgap: {_machine_error(OSError(errno.ENOSPC, 'no space'))}", file=sys.stderr)
        return MachineError.exit_code
    except KeyboardInterrupt:
        print("capgap: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP)
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"capgap {version('capgap')}")
        return 0
    commands = _commands()
    if arguments[0] not in commands:
        raise CapgapError("no such command", found=arguments[0], expected=f"one of {', '.join(commands)}")
    return commands[arguments[0]](arguments[1:])


def _commands() -> dict[str, Command]:
    from capgap.jobs.commands import run_command, stage_command, status_command, verify_command
    from capgap.jobs.law import law_command
    from capgap.pipeline.store import keep_freed_memory
    from capgap.pipeline.workflow.context import STAGES

    keep_freed_memory()
    commands: dict[str, Command] = {"run": run_command, "status": status_command, "verify": verify_command}
    commands["law"] = law_command
    return commands | {stage: stage_command(stage) for stage in STAGES}


def _machine_error(error: OSError) -> MachineError:
    where = error.filename or "the output folder"
    if error.errno in (errno.EROFS, errno.EACCES):
        return MachineError(
            "cannot be written", where=where, found=os.strerror(error.errno), fix="choose another `out`"
        )
    return MachineError(
        "no space is left to write to",
        where=where,
        found=os.strerror(error.errno or 0),
        fix="free some space and run the same command again; finished shards are kept",
    )


if __name__ == "__main__":
    sys.exit(main())
