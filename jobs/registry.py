"""The commands by name: the module of each, and its line in `capgap --help`. A module is imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from capgap.pipeline.stages import declared

if TYPE_CHECKING:
    from capgap.jobs.arguments import Parser

Run = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: the words typed after `capgap`, for example `law plan`.
        help: what the command does, in one line.
        module: name of its module in capgap.jobs.
        function: name of the function that runs it. Its parser is made by the function whose name ends in `_parser` in
            place of `_command`.
    """

    name: str
    help: str
    module: str
    function: str

    def run(self, argv: Sequence[str]) -> int:
        """Run the command with its arguments, and return the exit code."""
        module = import_module(f"capgap.jobs.{self.module}")
        run: Run = module.stage_command(self.name) if self.is_stage else getattr(module, self.function)
        return run(argv)

    def parser(self) -> Parser:
        """Return the parser of its arguments."""
        module = import_module(f"capgap.jobs.{self.module}")
        make = getattr(module, self.function.removesuffix("_command") + "_parser")
        parser: Parser = make(self.name) if self.is_stage else make()
        return parser

    @property
    def is_stage(self) -> bool:
        """Whether the command makes one stage of a run file."""
        return self.function == "stage_command"


def stage_names() -> tuple[str, ...]:
    """Return the names of the stages, in order."""
    return tuple(stage.name for stage in declared())


_OTHERS = (
    Command("run", "make every stage of a run file current; --only STAGE, --from STAGE", "commands", "run_command"),
    Command("status", "say whether every stage is current, and why not; --watch, --json", "status", "status_command"),
    Command("plan", "estimate tokens, disk and device hours of a run before it is made", "plan", "plan_command"),
    Command("init", "write a commented run file here", "init", "init_command"),
    Command("ls", "list the run files that are shipped, or the runs in a folder", "listing", "ls_command"),
    Command("doctor", "show what this machine has, and what capgap can do on it", "doctor", "doctor_command"),
    Command("verify", "check files and shards against their digests; --rescore", "commands", "verify_command"),
    Command(
        "fidelity", "measure how exactly a cache stores its teacher's distributions", "fidelity", "fidelity_command"
    ),
    Command("import", "make a cache of another program's captures in Parquet", "interchange", "import_command"),
    Command("export", "write a cache as Parquet, for other programs", "interchange", "export_command"),
    Command(
        "law plan", "estimate what a grid of teachers, students and seeds will take", "law_grid", "grid_plan_command"
    ),
    Command("law run", "make every run of a grid, then table, fit and page", "law_grid", "grid_run_command"),
    Command("law table", "write the table of a grid's results so far", "law_grid", "grid_table_command"),
    Command(
        "law submit",
        "write a grid's results so far into one file, for others to add",
        "law_grid",
        "grid_submit_command",
    ),
    Command("law fit", "find the best teacher for each student of a table of runs", "law", "fit_command"),
    Command("law report", "make the HTML page of a fit: curves, verdicts, frontiers", "law", "report_command"),
    Command("law advise", "say which teacher suits a student that is not trained yet", "law", "advise_command"),
    Command(
        "completion", "print a script that completes capgap's words in bash or zsh", "completion", "completion_command"
    ),
)

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (*_OTHERS, *(Command(stage.name, stage.help, "commands", "stage_command") for stage in declared()))
}
"""Every command by its name."""


def first_words() -> list[str]:
    """Return the words that may follow `capgap`, without repetitions."""
    return list(dict.fromkeys(name.split()[0] for name in COMMANDS))


def overview(prefix: str = "") -> str:
    """Return the text of `capgap --help`, or of `capgap law --help` for the prefix `law `."""
    chosen = [command for command in COMMANDS.values() if command.name.startswith(prefix)]
    lines = [
        f"usage: capgap {f'{prefix}COMMAND' if prefix else 'COMMAND'} [RUN.yaml or a shipped name] [--flag ...]",
        "",
    ]
    lines += [f"  {command.name:<12}{command.help}" for command in chosen if not command.is_stage]
    if not prefix:
        lines += ["", "One stage of the run file:", ""]
        lines += [f"  {command.name:<12}{command.help}" for command in chosen if command.is_stage]
        lines += ["", "Every setting of a run file is also a flag: capgap run RUN.yaml --train.learning_rate 1e-3"]
        lines += ["--log-format json makes every line one JSON object, for any command."]
    lines += ["", "capgap COMMAND --help shows its flags. capgap --version says which capgap this is."]
    return "\n".join(lines)
