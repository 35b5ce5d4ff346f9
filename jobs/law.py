"""`capgap law fit|report|advise`: fits, their page, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capgap.jobs.arguments import Parser, number, one_of, parse
from capgap.schemas.errors import SettingError


def fit_parser() -> Parser:
    """The parser of `capgap law fit`."""
    parser = _parser("fit", "Fit a table of runs, one row a run.")
    parser.add_argument("table", type=str, help="JSON lines, as docs/law.md describes them.")
    parser.add_argument("--out", type=str, default=None, help="Folder for law.json; the table's where it is left out.")
    parser.add_argument(
        "--size",
        type=one_of("total", "non_embedding"),
        default="total",
        help="Parameters that count as size: all, or without embedding and head.",
    )
    parser.add_argument(
        "--delta", type=number, default=0.005, help="Nats/token below which two teachers count as equally good."
    )
    parser.add_argument(
        "--add", nargs="+", type=str, default=[], help="Files of `capgap law submit`, whose rows join the table's."
    )
    parser.add_argument(
        "--public", type=str, default=None, help="YAML of published results, on which the rules are scored too."
    )
    return parser


def report_parser() -> Parser:
    """The parser of `capgap law report`."""
    parser = _parser("report", "Make the page of a fit.")
    parser.add_argument("fit", type=str, help="law.json, or its folder.")
    parser.add_argument("--out", type=str, default=None, help="Folder for law.html; the fit's where it is left out.")
    return parser


def advise_parser() -> Parser:
    """The parser of `capgap law advise`."""
    parser = _parser("advise", "Which teacher suits a student, source by source.")
    parser.add_argument("--student", type=str, required=True, help="Parameters, e.g. 3B or 350M.")
    parser.add_argument("--tokens", type=str, required=True, help="It will be trained on, e.g. 126B.")
    parser.add_argument("--teachers", type=str, required=True, help="Parameters of those at hand, e.g. 7B,13B,70B.")
    parser.add_argument(
        "--teacher-tokens",
        type=str,
        default=None,
        help="They were trained on, one for all or one each; 20 a parameter is assumed where it is left out.",
    )
    parser.add_argument("--fit", type=str, default=None, help="law.json of a grid of your own, or its folder.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser


def _parser(name: str, description: str) -> Parser:
    return Parser(f"capgap law {name}", description)


def fit_command(argv: Sequence[str]) -> int:
    """`capgap law fit`."""
    flags = parse(fit_parser(), argv)
    from capgap.pipeline.law.fit import fit_table, write_fit
    from capgap.pipeline.law.summary import lines

    if not flags["delta"] > 0:
        raise SettingError("not a difference", where="--delta", found=flags["delta"], expected="nats above 0")
    table = Path(flags["table"])
    public = Path(flags["public"]) if flags["public"] else None
    law = fit_table(table, flags["size"], flags["delta"], [Path(one) for one in flags["add"]], public)
    path = write_fit(Path(flags["out"]) if flags["out"] else table.parent, law)
    for line in lines(law):
        print(line)
    print(f"fit: {path}")
    return 0


def report_command(argv: Sequence[str]) -> int:
    """`capgap law report`."""
    flags = parse(report_parser(), argv)
    from capgap.pipeline.law.fit import read_fit
    from capgap.pipeline.law.page import write_page

    given = Path(flags["fit"])
    law = read_fit(given)
    folder = given if given.is_dir() else given.parent
    print(f"report: {write_page(Path(flags['out']) if flags['out'] else folder, law)}")
    return 0


def advise_command(argv: Sequence[str]) -> int:
    """`capgap law advise`."""
    flags = parse(advise_parser(), argv)
    from capgap.pipeline.law.advise import advise
    from capgap.pipeline.law.counts import parse_count, parse_counts
    from capgap.pipeline.law.fit import read_fit
    from capgap.pipeline.law.summary import advice_lines
    from capgap.pipeline.plan.published import GivenTeacher

    sizes = parse_counts(flags["teachers"], "--teachers")
    names = [name.strip() for name in flags["teachers"].split(",")]
    trained = _teacher_tokens(flags["teacher_tokens"], len(sizes))
    teachers = [GivenTeacher(*facts) for facts in zip(names, sizes, trained, strict=True)]
    fit = read_fit(Path(flags["fit"])) if flags["fit"] else None
    student, tokens = parse_count(flags["student"], "--student"), parse_count(flags["tokens"], "--tokens")
    found = advise(student, tokens, teachers, fit)
    if flags["json"]:
        print(found.model_dump_json(indent=2))
    else:
        for line in advice_lines(found):
            print(line)
    return 0


def _teacher_tokens(text: str | None, num_teachers: int) -> Sequence[int | None]:
    from capgap.pipeline.law.counts import parse_counts

    if text is None:
        return [None] * num_teachers
    counts = parse_counts(text, "--teacher-tokens")
    if len(counts) not in (1, num_teachers):
        raise SettingError(
            "not as many as teachers", where="--teacher-tokens", found=len(counts), expected=f"1 or {num_teachers}"
        )
    return counts if len(counts) == num_teachers else counts * num_teachers
