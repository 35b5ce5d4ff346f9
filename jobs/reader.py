"""Reads settings from their file and from flags, and checks them in one pass.

file --yaml_nodes--> values with lines --flags laid over--> one validation --> the record
                                                                 |
                           every problem, with its line of the file or its flag  <--+
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from capgap.jobs.problems import Origin, errors_of, not_finite, unknown_setting
from capgap.jobs.settings import Setting, find, locate
from capgap.jobs.shipped import find_file
from capgap.jobs.yaml_nodes import Loc, YamlDocument, parse_value, read_document
from capgap.schemas.base import Record
from capgap.schemas.errors import InputError, SettingError, SettingsError

_R = TypeVar("_R", bound=Record)

Given = tuple[str, str | None]
"""A setting given as a flag: its dotted name, and its value in YAML or None if no value followed."""

# Environment variable with the classes of loggers that the user has typed, read by the processes of the stages.
_TRUSTED = "CAPGAP_LOGGER_CLASSES"


def read_settings(record: type[_R], file: str | Path | None, given: Sequence[Given] = ()) -> _R:
    """Read settings from a file and from flags, which override the file. Later flags override earlier ones.

    Args:
        record: the record whose settings they are.
        file: path of the file, or the name of a shipped one; None if all settings are flags.
        given: the settings given as flags.

    Raises:
        InputError: the file is missing or not YAML.
        SettingError: a setting is unknown, missing, of the wrong type, or contradicts another.
    """
    path, document = read_file(record, file)
    values = document.values
    flags: dict[Loc, str] = {}
    unknown: dict[Loc, Any] = {}
    for name, text in given:
        flag, loc = f"--{name}", locate(record, name, values)
        setting = find(record, loc)
        flags = {loc: flag} | {at: before for at, before in flags.items() if at[: len(loc)] != loc}
        if setting is None:
            unknown[loc] = text
            continue
        value = _value_of(setting, flag, text)
        trust_loggers(value, loc)
        values = _laid_over(values, loc, value)
    _require_kind(record, values, path)
    origin = Origin(record, values, path, document.lines, flags, document.words)
    problems = [unknown_setting(loc, value, origin) for loc, value in unknown.items()]
    try:
        settings = record.model_validate(values)
        problems += not_finite(settings.model_dump(), origin)
    except ValidationError as error:
        raise together([*problems, *errors_of(error, origin)]) from None
    if problems:
        raise together(problems)
    return settings


def read_file(record: type[Record], file: str | Path | None) -> tuple[Path | None, YamlDocument]:
    """Read the values and lines of a file of settings, without checking them, except that it may not name a class.

    Args:
        record: the record whose settings they are.
        file: path of the file, or the name of a shipped one; None for no file, which gives no values.

    Raises:
        InputError: the file is missing or not YAML.
        SettingError: the file names a class.
    """
    if file is None:
        return None, YamlDocument({}, {}, frozenset())
    path = find_file(file)
    document = read_document(path)
    require_no_class(Origin(record, document.values, path, document.lines, {}), document.values)
    for loc in sorted(document.bare, key=len):
        _open_section(record, document.values, loc)
    return path, document


def together(problems: list[SettingError]) -> SettingError:
    """Return several problems as one error, whose message has one line for each."""
    return problems[0] if len(problems) == 1 else SettingsError(problems)


def _require_kind(record: type[Record], values: dict[Any, Any], path: Path | None) -> None:
    """Raise InputError if a grid file is given in place of a run file, or a run file in place of a grid file."""
    takes_grids = "teachers" in record.model_fields
    is_grid = "teachers" in values and "students" in values
    is_run = "teachers" not in values and ("teacher" in values or "student" in values)
    if path is None or not (is_run if takes_grids else is_grid and "teacher" in record.model_fields):
        return
    found, expected, command = ("a grid file", "a run file", "law run") if is_grid else ("a run file", "a grid", "run")
    fix = f"did you mean capgap {command} {path}?"
    raise InputError("another kind of file", where=path, found=found, expected=expected, fix=fix)


def _open_section(record: type[Record], values: dict[Any, Any], loc: Loc) -> None:
    """Give a section its defaults if its name in the file has nothing after the colon."""
    setting, outer = find(record, loc), values
    if setting is None or any(isinstance(part, int) for part in loc):
        return
    for part in loc[:-1]:
        outer = outer[part]
    if outer.get(loc[-1], "") is not None:
        return
    if setting.section is not None:
        outer[loc[-1]] = {}
    elif setting.entry is not None:
        del outer[loc[-1]]


def _value_of(setting: Setting, flag: str, text: str | None) -> Any:
    if text is None:
        raise SettingError("has no value", where=flag, expected=f"one: {setting.kind}", fix=f"write {flag} VALUE")
    if setting.takes_text and text != "null":
        return text
    quoted = f'"{text}"'
    fix = f"write '[{quoted}]'" if setting.kind.startswith("list") else f"put what is text in quotes: '{quoted}'"
    return parse_value(text, flag, fix)


def _laid_over(values: Any, loc: Loc, value: Any) -> Any:
    """Return the values with one of them set. A value on its path that is no mapping, such as a list, is replaced."""
    if not loc:
        return value
    here = dict(values) if isinstance(values, dict) else {}
    here[loc[0]] = _laid_over(here.get(loc[0]), loc[1:], value)
    return here


def trust_loggers(value: Any, loc: Loc) -> None:
    """Allow the processes of stages to import loggers of any class that a flag or an argument of `capgap.run` names.

    The user typed these, whereas a run file may come from somebody else and may not name any class.

    Args:
        value: value of the setting.
        loc: location of the setting.
    """
    if isinstance(value, Mapping):
        for name, one in value.items():
            trust_loggers(one, (*loc, name))
    if not isinstance(value, (list, tuple)) or loc[-1] != "loggers":
        return
    names = [str(one["class_path"]) for one in value if isinstance(one, Mapping) and "class_path" in one]
    os.environ[_TRUSTED] = ",".join(dict.fromkeys([*_trusted(), *names]))


def _trusted() -> list[str]:
    return [name for name in os.environ.get(_TRUSTED, "").split(",") if name]


def _is_logger(item: object) -> bool:
    """Return whether a run file may name a logger: by a short name, one of Lightning's, or one that the user typed."""
    if not isinstance(item, Mapping) or not item.keys() <= {"class_path", "init_args"}:
        return False
    name = item.get("class_path")
    if not isinstance(name, str):
        return False
    return "." not in name or name.startswith("lightning.pytorch.loggers.") or name in _trusted()


def require_no_class(origin: Origin, value: object, loc: Loc = ()) -> None:
    """Raise SettingError if a run file names a class to import, because it may be untrusted.

    Args:
        origin: where the settings come from.
        value: values of the run file, or of its part at `loc`.
        loc: location of `value`.
    """
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            is_logger = loc[-1:] == ("loggers",) and isinstance(item, Mapping) and _is_logger(item)
            require_no_class(origin, item.get("init_args") if is_logger else item, (*loc, number))
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name == "class_path":
                raise SettingError(
                    "a run file cannot name a class",
                    where=origin.place((*loc, name)),
                    found=item,
                    expected="settings; in train.loggers a logger's name, or a class of lightning.pytorch.loggers",
                    fix="give a class of your own by a flag, as in --train.loggers, or to capgap.run as "
                    "train={'loggers': [...]}",
                )
            require_no_class(origin, item, (*loc, name))
