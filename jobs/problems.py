"""Turns pydantic's validation errors into capgap's errors, each with its line in the file or its flag."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from capgap.jobs.settings import children, find
from capgap.jobs.suggest import did_you_mean, settings_like
from capgap.jobs.yaml_nodes import Loc, dotted
from capgap.schemas.base import Record
from capgap.schemas.errors import SettingError

# What was expected, by the beginning of pydantic's error type.
_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite_number": "a number that is finite",
    "bool": "true or false",
    "string_too_short": "text that is not empty",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "settings by name",
    "model": "settings by name",
}

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}

# Messages of capgap's validators begin like `cache.top_k: found 5, ...`, `a + b: found ...` or `name, arms: found ...`
_NAMED = re.compile(r"([\w.]+(?:(?: \+ |, )[\w.]+)*): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Origin:
    """Where settings come from.

    Attributes:
        record: the record whose settings they are.
        values: the values of the file, with those of flags laid over them.
        path: path of the file; None if all settings are flags.
        lines: line numbers of the file's values, by location.
        flags: flags by the location that they set, the last one first.
        words: how the file writes each true or false, by location.
    """

    record: type[Record]
    values: Any
    path: Path | None
    lines: dict[Loc, int]
    flags: dict[Loc, str]
    words: dict[Loc, str] = field(default_factory=dict)

    def place(self, loc: Loc, name: str = "") -> str:
        """Return the name of a setting with its flag, or with its file and line, for an error."""
        name = name or dotted(loc)
        given = next((flag for at, flag in self.flags.items() if loc[: len(at)] == at), None)
        if given is not None:
            return given if name == given.removeprefix("--") else f"{given}: {name}"
        if self.path is None:
            return f"--{name}"
        line = next((self.lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in self.lines), None)
        place = f"{self.path}" if line is None else f"{self.path}, line {line}"
        return f"{place}: {name}" if name else place


def errors_of(error: ValidationError, origin: Origin) -> list[SettingError]:
    """Return the problems, one error for each setting, in the order of the file."""
    by_place: dict[Loc, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        by_place.setdefault(_standing(problem, origin), []).append(problem)
    ordered = sorted(by_place.items(), key=lambda item: origin.lines.get(item[0], len(origin.lines)))
    return [_error_of(loc, problems, origin) for loc, problems in ordered]


def not_finite(values: Any, origin: Origin, loc: Loc = ()) -> Iterator[SettingError]:
    """Yield an error for each number that is infinite or NaN, because no digest can be computed of such settings."""
    if isinstance(values, float) and not -float("inf") < values < float("inf"):
        yield SettingError("cannot be used", where=origin.place(loc), found=values, expected="a number that is finite")
    parts = (
        values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, (list, tuple)) else ()
    )
    for part, value in parts:
        yield from not_finite(value, origin, (*loc, part))


def unknown_setting(loc: Loc, value: Any, origin: Origin) -> SettingError:
    """Return the error for a name that is no setting."""
    if loc == ("config",):
        return SettingError(
            "a run file cannot name another",
            where=origin.place(loc),
            found=plain(value),
            expected="settings alone",
            fix="copy its settings into this one",
        )
    return SettingError("no such setting", where=origin.place(loc), found=plain(value), fix=_meant(loc, origin))


def plain(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"settings by name: {', '.join(map(str, value))}" if value else "{}"
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _standing(problem: ErrorDetails, origin: Origin) -> Loc:
    """Return the location of a problem without the parts that pydantic adds: members of a union, and `[key]`."""
    values: Any = origin.values
    loc: list[Any] = []
    for part in problem["loc"]:
        is_there = part in values if isinstance(values, dict) else isinstance(part, int) and part in range(_len(values))
        if not is_there:
            break
        values = values[part]
        loc.append(part)
    return (*loc, problem["loc"][-1]) if problem["type"] == "missing" else tuple(loc)


def _len(values: Any) -> int:
    return len(values) if isinstance(values, (list, tuple)) else 0


def _error_of(loc: Loc, problems: list[ErrorDetails], origin: Origin) -> SettingError:
    first, where = problems[0], origin.place(loc)
    match first["type"]:
        case "value_error":
            return _ours(loc, first["msg"].removeprefix("Value error, "), origin)
        case "extra_forbidden":
            return unknown_setting(loc, first["input"], origin)
        case "missing":
            return _missing(loc, origin)
    if first["loc"][-1] == "[key]" and first["type"] == "literal_error":
        options = re.findall("'([^']*)'", str(first["ctx"]["expected"]))
        meant = difflib.get_close_matches(str(first["input"]), options, n=1)
        return SettingError(
            "no such name", where=where, found=plain(first["input"]), expected=_expected(first), fix=did_you_mean(meant)
        )
    if first["loc"][-1] == "[key]":
        expected = "text for a name"
        return SettingError(
            "cannot be used", where=where, found=plain(first["input"]), expected=expected, fix="write it in quotes"
        )
    # show the word of the file, because YAML reads `on` as true
    written = first["input"]
    if isinstance(written, bool) and not any(loc[: len(at)] == at for at in origin.flags):
        written = origin.words.get(loc, written)
    expected = " or ".join(dict.fromkeys(_expected(problem) for problem in problems))
    return SettingError(
        "cannot be used",
        where=where,
        found=plain(written),
        expected=expected,
        fix=_fix(loc, written, expected, origin.record),
    )


def _ours(loc: Loc, message: str, origin: Origin) -> SettingError:
    """Return the error for a message of capgap's own validator, which may begin with a setting's short or full name."""
    named = _NAMED.fullmatch(message)
    if named is None:
        return SettingError(message, where=origin.place(loc))
    parts = re.split(r" \+ |, ", named[1])
    if dotted(loc[: parts[0].count(".") + 1]) == parts[0] and len(parts) == 1:
        # the message names an outer section of the location, as `budgets: found ...` does for budgets.short
        return SettingError(named[2], where=origin.place(loc))
    inside = loc if find(origin.record, (*loc, *parts[0].split("."))) is not None else ()
    if find(origin.record, (*inside, *parts[0].split("."))) is None:
        return SettingError(message, where=origin.place(loc))
    prefix = f"{dotted(inside)}." if inside else ""
    separator = " + " if " + " in named[1] else ", "
    names = separator.join(prefix + part for part in parts)
    # if a flag has set one of the settings, name that one
    locs = [(*inside, *part.split(".")) for part in parts]
    at = next((one for one in locs if one in origin.flags), locs[0])
    return SettingError(named[2], where=origin.place(at, names))


def _meant(loc: Loc, origin: Origin) -> str:
    names = settings_like(origin.record, loc)
    if loc in origin.flags or origin.path is None:
        return did_you_mean(f"--{name}" for name in names) or "`--help all` lists every setting"
    prefix = f"{dotted(loc[:-1])}." if len(loc) > 1 else ""
    if found := did_you_mean(name.removeprefix(prefix) for name in names):
        return found
    section = find(origin.record, loc[:-1])
    record = section.section if section is not None and section.section is not None else origin.record
    return f"there are {', '.join(str(setting.loc[-1]) for setting in children(record))}"


def _missing(loc: Loc, origin: Origin) -> SettingError:
    name, setting = dotted(loc), find(origin.record, loc)
    has_path = setting is not None and setting.section is not None and "path" in setting.section.model_fields
    flag = f"--{name}.path" if has_path else f"--{name}"
    if origin.path is None:
        return SettingError("is missing", where=flag, fix=f"give {flag} ...")
    written = f"{loc[-1]}: {{path: ...}}" if has_path else f"{loc[-1]}: ..."
    return SettingError("is missing", where=origin.place(loc), fix=f"write `{written}` into the file, or {flag} ...")


def _expected(problem: ErrorDetails) -> str:
    """Return the expected kind of value, in words."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"{words} {context[name]:g}"
    if kind == "literal_error":
        options = str(context["expected"]).replace("'", "")
        return f"one of {options}" if " or " in options else options
    if kind == "none_required":
        return "null"
    return next((words for name, words in _EXPECTED.items() if kind.startswith(name)), problem["msg"])


def _fix(loc: Loc, value: Any, expected: str, record: type[Record]) -> str | None:
    setting = find(record, loc)
    if expected == "settings by name" and isinstance(value, str):
        section = setting.section if setting is not None else None
        return f"write {{path: {value}}}" if section is not None and "path" in section.model_fields else None
    if expected == "a list" and isinstance(value, (str, int, float)):
        return f"write [{value}]"
    if expected == "text" and not isinstance(value, (dict, list, type(None))):
        return f'write "{plain(value)}"'
    return None
