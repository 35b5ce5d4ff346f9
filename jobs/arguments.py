"""The command line's arguments: flags derived from the run file's schema, YAML below them, errors in one line."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pydantic import ValidationError

from capgap.jobs.logs import LOG_FORMAT_HELP, LOG_FORMATS
from capgap.jobs.plain_yaml import require_plain
from capgap.schemas.base import Record
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_file import RunFile

_POINTLESS = re.compile(r"\s*For further information visit \S+\.?|\s*\[type=[^\]]*\]|\d+ validation errors? for \S+")

_R = TypeVar("_R", bound=Record)

_KINDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
_KINDS |= {"tuple": "a list, as in [1, 2]", "list": "a list, as in [1, 2]", "dict": "settings by name, as in {a: 1}"}

_BOUNDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
}


def run_parser(prog: str, description: str) -> ArgumentParser:
    """A parser that takes a run file, by position or as `--config`, and every setting of it as a flag."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", metavar="RUN.yaml", help="The run file; may stand first, bare.")
    parser.add_class_arguments(RunFile, None)
    add_log_format(parser)
    return parser


def add_log_format(parser: ArgumentParser) -> None:
    """The flag that every command takes; `set_up_logs` has read it by then."""
    parser.add_argument("--log-format", type=str, choices=LOG_FORMATS, default=None, help=LOG_FORMAT_HELP)


def parse_run(parser: ArgumentParser, argv: Sequence[str]) -> tuple[RunFile, dict[str, Any]]:
    """The run file with the flags laid over it, and the command's own flags.

    Raises:
        InputError: the file is missing or no YAML.
        SettingError: a setting is unknown, missing or of the wrong kind.
    """
    plain = parse(parser, _with_config_flag(argv))
    plain.pop("config", None)
    settings = {name: plain.pop(name) for name in RunFile.model_fields if name in plain}
    _require_finite(settings, "")
    try:
        return RunFile.model_validate(settings), plain
    except ValidationError as error:
        raise SettingError(said(error)) from None


def read_settings(record: type[_R], path: Path, given: dict[str, Any]) -> _R:
    """A file of settings by name, read as it stands, with those that were given as flags laid over it.

    Raises:
        InputError: the file is missing or no YAML.
        SettingError: a setting is unknown, missing or of the wrong kind.
    """
    require_plain(path, record)
    try:
        return record.model_validate({**yaml.safe_load(path.read_bytes()), **given})
    except ValidationError as error:
        raise SettingError(said(error), where=path) from None


def parse(parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    """The arguments as plain values.

    Raises:
        InputError: the run file is missing or no YAML.
        SettingError: an argument is unknown, missing or of the wrong kind.
    """
    _require_run_file(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values: dict[str, Any] = parser.parse_args(arguments).as_dict()
        return values
    except ArgumentError as error:
        raise _setting_error(str(error), parser) from None


def _with_config_flag(argv: Sequence[str]) -> list[str]:
    if argv and not argv[0].startswith("-"):
        return ["--config", *argv]
    if not any(word in ("-h", "--help") or word.startswith("--config") for word in argv):
        raise InputError("no run file is named", expected="its path after the command", fix="see jobs/runs/demo.yaml")
    return list(argv)


def _require_finite(value: Any, where: str) -> None:
    """No setting is infinite or no number, and no digest can be taken of one."""
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        raise SettingError("cannot be used", where=where, found=value, expected="a number that is finite")
    if isinstance(value, dict):
        for name, one in value.items():
            _require_finite(one, f"{where}.{name}" if where else str(name))
    if isinstance(value, (list, tuple)):
        for one in value:
            _require_finite(one, where)


def _require_run_file(arguments: list[str]) -> None:
    named = [value for flag, value in pairwise(arguments) if flag == "--config"]
    named += [flag.removeprefix("--config=") for flag in arguments if flag.startswith("--config=")]
    for path in named:
        require_plain(Path(path))


def said(error: ValidationError) -> str:
    """Every problem, each with the setting's full name and what was found there."""
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] != "value_error":
            message = f"{message}; found {problem['input']!r}"
            problems.append(f"{where}: {message}")
        elif where and not message.startswith(where):
            problems.append(f"{where}.{message}" if _names_a_setting(message) else f"{where}: {message}")
        else:
            problems.append(message)
    return "; ".join(problems)


def _names_a_setting(message: str) -> bool:
    return re.match(r"[a-z_]+: found ", message) is not None


def _setting_error(text: str, parser: ArgumentParser) -> SettingError:
    """jsonargparse's words, on one line, without addresses and types of exceptions."""
    unknown = re.search(r"unrecognized arguments: (--[\w.]+)", text)
    if unknown:
        return _unknown_flag(unknown.group(1), parser)
    text = " ".join(_POINTLESS.sub("", text).split())
    union = re.search(r'Parser key "([^"]*)": Does not validate against any .*Given value: (\S+)', text)
    nested = re.search(r"NestedArg\(key='([^']*)', val='?([^')]*)", text)
    if union and nested:
        name = f"{union.group(1)}.{nested.group(1)}"
        return SettingError("no such setting, or a value of the wrong kind", where=name, found=nested.group(2))
    if union:
        kinds = dict.fromkeys(_KINDS.get(kind, kind) for kind in re.findall(r"Expected a <class '(\w+)'>", text))
        return SettingError(
            "a value of the wrong kind",
            where=union.group(1),
            found=union.group(2),
            expected=" or ".join([*kinds, *(["settings by name"] if "null" in kinds and len(kinds) == 1 else [])])
            or None,
        )
    missing = re.search(r"the following arguments are required: ([\w.]+)", text)
    if missing:
        name = missing.group(1)
        return SettingError("is missing", where=name, fix=f"write `{name}: ...` into the run file, or --{name} ...")
    text = re.sub(r'Parser key "([^"]*)": ?', r"\1: ", text)
    found = re.fullmatch(r"([\w.]+): (.*?)\.? ?Got value: (.*)", text)
    if found:
        where, said, value = found.groups()
        return SettingError("cannot be used", where=where, found=value, expected=_expected(said))
    return SettingError(text.rstrip(". "))


def _expected(said: str) -> str:
    """What jsonargparse and pydantic say of a value, in our words."""
    options = re.match(r"Expected a typing.Literal\[(.*)\]", said)
    if options:
        return "one of " + options.group(1).replace("'", "")
    kind = re.match(r"Expected a <class '(\w+)'>", said)
    if kind:
        return _KINDS.get(kind.group(1), kind.group(1))
    said = said.partition(",")[0].removeprefix("Input should be ").removeprefix("a valid ")
    for theirs, ours in _BOUNDS.items():
        said = said.replace(theirs, ours)
    return {"number": "a number", "integer": "an integer"}.get(said, said)


def _unknown_flag(flag: str, parser: ArgumentParser) -> SettingError:
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1)
    return SettingError("no such setting", found=flag, fix=f"did you mean {near[0]}?" if near else "see --help")
