"""The `capgap` command: set up what it says and how, run it, report what went wrong in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from capgap.jobs.faults import CRASHED, INTERRUPTED, READER_GONE, named
from capgap.jobs.logs import set_up_logs, tell_crash, tell_error, tell_interrupted
from capgap.jobs.process import die_with_driver
from capgap.schemas.errors import CapgapError

Command = Callable[[Sequence[str]], int]

_HELP = """usage: capgap COMMAND [RUN.yaml] [--setting value ...]

  run       make every stage of a run file current; --only STAGE, --from STAGE, --force
  status    say of every stage whether it is current, and why not; --watch shows it at work, --json
  plan      say what a run will cost, before it does: tokens, disk, device hours; --json
  verify    check every file and shard below a folder against its digests; --rescore FRACTION asks the teacher too
  fidelity  what a cache keeps of its teacher, and which trainings it supports; --json, --teacher
  law       which teacher size is best for a student: run a grid, fit its table, its page, advice
  import    another program's captures, in Parquet, into a corpus and a cache
  export    a cache into Parquet, for other programs

  corpus    text into packed sequences                      (one stage of the run file)
  teacher   check or train the teacher
  cache     keep the teacher's distributions as shards
  student   the student's first weights
  train     train the student from the cache
  tune      make a chat model of a trained student, where the run file says so
  eval      measure teacher and students on held-out text
  benchmark measure them on tasks of lm-eval               (only with `benchmarks` in the run file)
  answers   every model answers questions                  (only with `judge`)
  judge     a language model judges the answers            (the same)
  report    one HTML page and one table

Every setting of the run file is also a flag: `capgap run RUN.yaml --train.learning_rate 1e-3`.
`--log-format json` makes every line one JSON object, for any command.
`capgap COMMAND --help` lists them. `capgap --version` says which capgap this is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 done, 1 a fault of ours, 2 what the user can mend, 3 the machine, 4 damaged data, 5 runs of a grid without a
    result, 130 interrupted, 141 where
    nobody reads the output any more, 128 + n where a stage was killed by signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    set_up_logs(arguments)
    # before torch is imported, with the commands: threads that spin while they wait cost up to 90 % of the speed on a
    # machine that has other work, and gain about 13 % on one that has none
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # notices of torch's own start-up that nobody can act on
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    die_with_driver()
    try:
        code = _dispatch(arguments)
        # here, where it is known what to do if nobody reads
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        tell_interrupted(INTERRUPTED)
        return INTERRUPTED
    except BrokenPipeError:
        # as in `capgap status RUN.yaml | head -1`; what is left in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except Exception as error:
        fault = named(error)
        if fault is None:
            tell_crash(error, CRASHED)
            return CRASHED
        if not fault.already_said:
            tell_error(fault)
        return fault.exit_code


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
    from capgap.jobs.commands import run_command, stage_command, verify_command
    from capgap.jobs.fidelity import fidelity_command
    from capgap.jobs.interchange import export_command, import_command
    from capgap.jobs.law import law_command
    from capgap.jobs.plan import plan_command
    from capgap.jobs.status import status_command
    from capgap.pipeline.stages import declared
    from capgap.pipeline.store import keep_freed_memory

    keep_freed_memory()
    commands: dict[str, Command] = {
        "run": run_command,
        "status": status_command,
        "plan": plan_command,
        "verify": verify_command,
        "fidelity": fidelity_command,
        "law": law_command,
        "import": import_command,
        "export": export_command,
    }
    return commands | {stage.name: stage_command(stage.name) for stage in declared()}


if __name__ == "__main__":
    sys.exit(main())
