"""The command line's arguments: flags derived from the run file's schema, YAML below them, errors in one line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from pydantic import ValidationError

from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_file import RunFile

_POINTLESS = re.compile(
    r"\s*For further information visit \S+\.?|\s*\[type=[^\]]*\]|^Value error, |\d+ validation errors? for \S+"
)


def run_parser(prog: str, description: str) -> ArgumentParser:
    """A parser that takes a run file, by position or as `--config`, and every setting of it as a flag."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", metavar="RUN.yaml", help="The run file; may stand first, bare.")
    parser.add_class_arguments(RunFile, None)
    return parser


def parse_run(parser: ArgumentParser, argv: Sequence[str]) -> tuple[RunFile, dict[str, Any]]:
    """The run file with the flags laid over it, and the command's own flags.

    Raises:
        InputError: the file is missing or no YAML.
        SettingError: a setting is unknown, missing or of the wrong kind.
    """
    arguments = _with_config_flag(argv)
    _require_run_file(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = parser.parse_args(arguments)
            values.pop("config", None)
            plain = parser.instantiate_classes(values).as_dict()
        settings = {name: plain.pop(name) for name in RunFile.model_fields if name in plain}
        return RunFile.model_validate({name: _dumped(value) for name, value in settings.items()}), plain
    except ArgumentError as error:
        raise _setting_error(str(error)) from None
    except ValidationError as error:
        raise SettingError(_said(error)) from None


def _with_config_flag(argv: Sequence[str]) -> list[str]:
    if argv and not argv[0].startswith("-"):
        return ["--config", *argv]
    return list(argv)


def _require_run_file(arguments: list[str]) -> None:
    for flag, value in pairwise(arguments):
        if flag != "--config":
            continue
        if not Path(value).is_file():
            raise InputError("no such run file", where=value, fix="see jobs/runs/demo.yaml for an example")
        try:
            content = yaml.safe_load(Path(value).read_bytes())
        except yaml.YAMLError as error:
            raise InputError("not a YAML file", where=value, found=error, expected="YAML") from None
        if not isinstance(content, dict):
            raise InputError("not a run file", where=value, found=type(content).__name__, expected="settings by name")


def _dumped(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _said(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {message}" if where else message)
    return "; ".join(problems)


def _setting_error(text: str) -> SettingError:
    """jsonargparse's words, on one line, without addresses and types of exceptions."""
    text = " ".join(_POINTLESS.sub("", text).split())
    text = re.sub(r'Parser key "([^"]*)": ?', r"\1: ", text)
    text = re.sub(r"\.? ?Got value: (.*)$", r"; found \1", text)
    return SettingError(text.rstrip(". "))
