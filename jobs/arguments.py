"""Reads the arguments of a command: its own flags, which argparse parses, and settings of its file given as flags.

arguments --split--> own flags and names --argparse--> values
                \\--> --a.b VALUE, --a.b=VALUE --reader--> the file with the settings laid over it
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

from capgap.jobs.logs import LOG_FORMAT_HELP, LOG_FORMATS
from capgap.jobs.reader import Given, read_settings
from capgap.jobs.settings import find
from capgap.jobs.shipped import shipped_names
from capgap.jobs.suggest import did_you_mean, settings_like
from capgap.pipeline.stages import run_file_type
from capgap.schemas.base import Record
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.home import with_home
from capgap.schemas.run_file import RunFile

_R = TypeVar("_R", bound=Record)
_NO_MARKS = str.maketrans("", "", "._-")


class Parsed(NamedTuple, Generic[_R]):
    """The parsed arguments of a command.

    Attributes:
        settings: the settings of the file and the flags together, checked.
        flags: values of the command's own flags, by name.
        given: the settings given as flags, as `--a.b=VALUE`, in their order.
    """

    settings: _R
    flags: dict[str, Any]
    given: list[str]


class Parser(argparse.ArgumentParser):
    """Parses a command's own flags, and holds the record whose settings are its other flags.

    Args:
        prog: the command, such as `capgap run`.
        description: what the command does, in a sentence.
        record: the record whose settings are flags; None for a command without settings.
        file: name of the file in the usage line; None for a command that takes no file.
        sections: sections whose most used settings the command's help shows first.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        record: type[Record] | None = None,
        file: str | None = None,
        sections: Sequence[str] = (),
    ) -> None:
        super().__init__(prog=prog, description=description, add_help=False, allow_abbrev=False, exit_on_error=False)
        self.record, self.file, self.sections = record, file, tuple(sections)
        if file is not None:
            self.add_argument("--config", metavar=file, action="append", default=[], help="The file, given as a flag.")
        self.add_argument("--log-format", type=one_of(*LOG_FORMATS), metavar="FORMAT", help=LOG_FORMAT_HELP)

    def error(self, message: str) -> NoReturn:
        """Raise argparse's error about the arguments as a whole as a SettingError."""
        raise SettingError(message, expected=self.usage_line, fix=f"see {self.prog} --help")

    @property
    def usage_line(self) -> str:
        """The usage of the command in one line: its file, positional arguments and flags."""
        words = [self.prog, *([] if self.file is None else [self.file])]
        for action in self.positionals:
            words.append(f"{action.metavar or action.dest}{' ...' if action.nargs == '+' else ''}")
        words += [f"{flag.option_strings[0]} {flag.dest.upper()}" for flag in self.own_flags if flag.required]
        return " ".join([*words, "[flags]", *(["[--SETTING VALUE ...]"] if self.record is not None else [])])

    def own(self, flag: str) -> argparse.Action | None:
        """Return the command's own flag of this name; None if it has none."""
        return self._option_string_actions.get(flag)

    @property
    def own_flags(self) -> list[argparse.Action]:
        """The command's own flags; those that every command has come last."""
        flags = [action for action in self._actions if action.option_strings]
        return sorted(flags, key=lambda action: action.dest in ("config", "log_format"))

    @property
    def positionals(self) -> list[argparse.Action]:
        """The positional arguments of the command, without its file."""
        return [action for action in self._actions if not action.option_strings]


def run_file_parser(prog: str, description: str, sections: Sequence[str] = ()) -> Parser:
    """Return a parser for a command that takes a run file, by position or as `--config`, and its settings as flags."""
    return Parser(prog, description, run_file_type(), "RUN", sections)


def number(text: str) -> float:
    """Read a number; used as the `type` of a flag."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number") from None


def integer(text: str) -> int:
    """Read an integer; used as the `type` of a flag."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, expected an integer") from None


def one_of(*options: str) -> Callable[[str], str]:
    """Return a function for the `type` of a flag, which accepts only the words given here."""

    def chosen(text: str) -> str:
        if text not in options:
            near = did_you_mean(option for option in options if option.startswith(text[:1]))
            raise argparse.ArgumentTypeError(
                f"found {text}, expected {' or '.join(options)}" + (f"; {near}" if near else "")
            )
        return text

    return chosen


def parse_run(parser: Parser, argv: Sequence[str]) -> Parsed[RunFile]:
    """Read a run file with the settings given as flags over it, and the command's own flags.

    Raises:
        InputError: the file is missing or not YAML.
        SettingError: a flag or setting is unknown, missing or of the wrong type.
    """
    return parse_settings(parser, argv, run_file_type())


def parse_settings(parser: Parser, argv: Sequence[str], record: type[_R]) -> Parsed[_R]:
    """Read the settings of any record, from its file and from flags or from flags alone, and the command's own flags.

    Raises:
        InputError: the file is missing or not YAML.
        SettingError: a flag or setting is unknown, missing or of the wrong type.
    """
    files, own, given = _split(parser, argv, record)
    flags = _parse_own(parser, own)
    texts = [f"--{name}" if text is None else f"--{name}={text}" for name, text in given]
    if parser.file is None:
        named = {name: value for name, value in flags.items() if name in record.model_fields and value is not None}
        given = [*given, *((name, json.dumps(value)) for name, value in named.items())]
        return Parsed(read_settings(record, None, given), flags, texts)
    files += flags.pop("config")
    if not files:
        if unknown := [name for name, _ in given if _is_unknown(record, name)]:
            raise _unknown(parser, unknown[0], record)
        raise InputError(
            f"no {parser.file} file is named" if parser.file != "RUN" else "no run file is named",
            where=parser.prog,
            expected=parser.usage_line,
            fix="`capgap ls` lists the shipped ones, and `capgap init` writes one",
        )
    if len(files) > 1:
        for number, word in enumerate(files):
            _refuse_bare(word, word, " ".join(files[number + 1 : number + 2]), record)
        raise SettingError("two files are named", found=" and ".join(files), expected="one")
    return Parsed(read_settings(record, files[0], given), flags, texts)


def parse(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Read the flags of a command that has no settings.

    Raises:
        SettingError: a flag is unknown, missing or of the wrong type.
    """
    _, own, _ = _split(parser, argv, None)
    return _parse_own(parser, own)


def _split(
    parser: Parser, argv: Sequence[str], record: type[Record] | None
) -> tuple[list[str], list[str], list[Given]]:
    """Split the arguments into files, the command's own arguments, and settings."""
    files: list[str] = []
    own: list[str] = []
    given: list[Given] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--") or word == "--":
            if record is not None and (equals or word.startswith("-")):
                _refuse_bare(flag, word, value or " ".join(words[:1]), record)
            (own if parser.file is None or word.startswith("-") else files).append(word)
        elif (action := parser.own(flag)) is not None:
            own.append(word)
            if not equals and action.nargs != 0 and (not words or words[0].startswith("--")):
                raise SettingError("has no value", where=flag, fix=f"see {parser.prog} --help")
            if not equals and action.nargs != 0:
                several = action.nargs in ("+", "*")
                while words and not words[0].startswith("--") and (several or own[-1] == word):
                    own.append(words.pop(0))
        elif record is None:
            raise _unknown(parser, flag.removeprefix("--"), record)
        elif equals:
            given.append((flag.removeprefix("--"), value))
        else:
            has_value = bool(words) and not words[0].startswith("--")
            if _is_unknown(record, flag.removeprefix("--")):
                if not has_value:
                    raise _unknown(parser, flag.removeprefix("--"), record)
                name, equals, value = words[0].partition("=")
                if equals:
                    _refuse_bare(name, words[0], value, record, before=f"{flag} ")
            given.append((flag.removeprefix("--"), words.pop(0) if has_value else None))
    _refuse_own_misspelt(parser, given, record)
    return files, own, given


def _refuse_own_misspelt(parser: Parser, given: Sequence[Given], record: type[Record] | None) -> None:
    """Raise SettingError for a flag that is no setting and is spelt like one of the command's own flags."""
    for name, _ in given:
        if record is not None and _is_unknown(record, name) and _own_like(parser, name):
            raise _unknown(parser, name, record)


def _is_unknown(record: type[Record], name: str) -> bool:
    return find(record, tuple(name.split("."))) is None


def _refuse_bare(name: str, word: str, value: str, record: type[Record], before: str = "") -> None:
    """Raise SettingError, with the flag that was meant, for a setting in the syntax of other programs.

    Examples are `lr 1e-3`, `+train.lr=1e-3`, `-lr 1e-3`, and, with `before` as `--set `, `--set train.lr=1e-3`.
    """
    plain = name.lstrip("+-").replace("/", "." if "=" in word else "/")
    if Path(word).exists() or word in shipped_names() or not plain.translate(_NO_MARKS).isalnum():
        return
    name = plain if "=" in word or word.startswith("-") else name
    loc = tuple(name.split("."))
    meant = [name] if find(record, loc) is not None else settings_like(record, loc)
    if meant:
        text = f"{'=' if '=' in word else ' '}{value}" if value else ""
        what = "no such flag" if before or word.startswith("-") else "no such file"
        raise SettingError(what, where=before + word, fix=did_you_mean(f"--{one}{text}" for one in meant))


def _unknown(parser: Parser, name: str, record: type[Record] | None) -> SettingError:
    meant = _own_like(parser, name)
    if record is not None and not meant:
        meant = [f"--{one}" for one in settings_like(record, tuple(name.split(".")))]
    return SettingError(
        "no such flag" if record is None else "no such setting",
        where=f"--{name}",
        fix=did_you_mean(meant) or f"see {parser.prog} --help",
    )


def _own_like(parser: Parser, name: str) -> list[str]:
    known = [option for action in parser.own_flags for option in action.option_strings]
    return difflib.get_close_matches(f"--{name}".replace("_", "-"), known, n=1, cutoff=0.8)


def _parse_own(parser: Parser, own: list[str]) -> dict[str, Any]:
    try:
        values, more = parser.parse_known_args(own)
    except argparse.ArgumentError as error:
        raise SettingError(str(error.message), where=error.argument_name, fix=f"see {parser.prog} --help") from None
    if more:
        raise SettingError("not understood", where=" ".join(more), fix=f"see {parser.prog} --help")
    flags = {name: with_home(value) for name, value in vars(values).items()}
    flags.pop("log_format")
    return flags
