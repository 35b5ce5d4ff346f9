"""`capgap law fit`, `report` and `advise`: fit a table of runs, make the page of a fit, and give advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capgap.jobs.arguments import Parser, number, one_of, parse
from capgap.schemas.errors import SettingError


def fit_parser() -> Parser:
    """Return the parser of `capgap law fit`."""
    parser = _parser("fit", "Fit the laws to a table of runs, which has one row per run.")
    parser.add_argument("table", type=str, help="Table of runs as JSON lines; docs/law.md describes them.")
    parser.add_argument("--out", type=str, default=None, help="Folder for law.json. Left out, the table's folder.")
    parser.add_argument(
        "--size",
        type=one_of("total", "non_embedding"),
        default="total",
        help="Parameters that count as a model's size: all, or those without embedding and head.",
    )
    parser.add_argument(
        "--delta",
        type=number,
        default=0.005,
        help="Difference in nats/token below which two teachers count as equally good.",
    )
    parser.add_argument(
        "--add", nargs="+", type=str, default=[], help="Files of `capgap law submit`, whose rows are added."
    )
    parser.add_argument(
        "--public", type=str, default=None, help="YAML file of published results, on which rules are scored too."
    )
    return parser


def report_parser() -> Parser:
    """Return the parser of `capgap law report`."""
    parser = _parser("report", "Make the HTML page of a fit.")
    parser.add_argument("fit", type=str, help="Path of law.json, or of its folder.")
    parser.add_argument("--out", type=str, default=None, help="Folder for law.html. Left out, the folder of the fit.")
    return parser


def advise_parser() -> Parser:
    """Return the parser of `capgap law advise`."""
    parser = _parser("advise", "Say which teacher suits a student, by each published law and by a fit of your own.")
    parser.add_argument("--student", type=str, required=True, help="Parameters of the student, e.g. 3B or 350M.")
    parser.add_argument("--tokens", type=str, required=True, help="Tokens that the student will train on, e.g. 126B.")
    parser.add_argument(
        "--teachers", type=str, required=True, help="Parameters of the available teachers, e.g. 7B,13B,70B."
    )
    parser.add_argument(
        "--teacher-tokens",
        type=str,
        default=None,
        help="Tokens that the teachers were trained on: one number for all, or one each. Left out, 20 per parameter.",
    )
    parser.add_argument("--fit", type=str, default=None, help="Path of law.json of your own grid, or of its folder.")
    parser.add_argument("--json", action="store_true", help="Print the advice as JSON.")
    return parser


def _parser(name: str, description: str) -> Parser:
    return Parser(f"capgap law {name}", description)


def fit_command(argv: Sequence[str]) -> int:
    """Run `capgap law fit`: write law.json and print its summary."""
    flags = parse(fit_parser(), argv)
    from capgap.pipeline.law.fit import fit_table, write_fit
    from capgap.pipeline.law.summary import lines

    if not 0 < flags["delta"] < float("inf"):
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
    """Run `capgap law report`: write law.html."""
    flags = parse(report_parser(), argv)
    from capgap.pipeline.law.fit import read_fit
    from capgap.pipeline.law.page import write_page

    given = Path(flags["fit"])
    law = read_fit(given)
    folder = given if given.is_dir() else given.parent
    print(f"report: {write_page(Path(flags['out']) if flags['out'] else folder, law)}")
    return 0


def advise_command(argv: Sequence[str]) -> int:
    """Run `capgap law advise`: print lines, or JSON."""
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
