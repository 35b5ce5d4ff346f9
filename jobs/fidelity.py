"""`capgap fidelity`: shows how exactly a cache stores its teacher's distributions, and which trainings it supports."""

from __future__ import annotations

from collections.abc import Sequence

from capgap.jobs.arguments import Parser, integer, one_of, parse
from capgap.jobs.logs import log, log_format
from capgap.schemas.errors import SettingError


def fidelity_command(argv: Sequence[str]) -> int:
    """Run `capgap fidelity`: print tables, or JSON. No file is written."""
    flags = parse(fidelity_parser(), list(argv))
    for name in ("num_sequences", "num_shards", "num_teacher_sequences"):
        if flags[name] < 1:
            raise SettingError("too few", where=f"--{name.replace('_', '-')}", found=flags[name], expected="at least 1")
    from rich.table import Table

    from capgap.jobs.tables import print_wide
    from capgap.pipeline.fidelity.fidelity import Teacher, measure_cache
    from capgap.pipeline.fidelity.sample import Sampling
    from capgap.pipeline.fidelity.text import shown

    teacher = None
    if flags["teacher"] is not None:
        teacher = Teacher(flags["teacher"], flags["device"], not flags["no_wait"], flags["trust_remote_code"])
    found = measure_cache(
        flags["cache"],
        Sampling(flags["num_sequences"], flags["num_shards"]),
        teacher,
        flags["num_teacher_sequences"],
    )
    if flags["json"]:
        print(found.model_dump_json(indent=2))
    elif log_format() == "json":
        log("fidelity", f"fidelity of {found.location}", **found.model_dump(mode="json"))
    else:
        for part in shown(found):
            if isinstance(part, Table):
                print_wide(part)
            else:
                print(part)
    return 0


def fidelity_parser() -> Parser:
    """Return the parser of `capgap fidelity`."""
    parser = Parser(
        prog="capgap fidelity",
        description="Show how exactly a finished cache stores its teacher's distributions, and what it can train.",
    )
    parser.add_argument("cache", type=str, help="Folder or URL of a finished cache.")
    parser.add_argument("--json", action="store_true", help="Print the figures as one JSON object.")
    parser.add_argument("--num-sequences", type=integer, default=256, help="Evenly spaced sequences to read.")
    parser.add_argument(
        "--num-shards", type=integer, default=8, help="Shards to open; all shards if all sequences are to be read."
    )
    parser.add_argument(
        "--teacher", type=str, default=None, help="Folder or id of the teacher, to score some sequences again."
    )
    parser.add_argument(
        "--num-teacher-sequences", type=integer, default=16, help="Sequences that the teacher scores again."
    )
    parser.add_argument("--device", type=one_of("auto", "cpu", "cuda"), default="auto", help="Where the teacher runs.")
    parser.add_argument("--no-wait", action="store_true", help="Stop if a stage holds the device.")
    parser.add_argument("--trust-remote-code", action="store_true", help="Run code that comes with the teacher.")
    return parser
