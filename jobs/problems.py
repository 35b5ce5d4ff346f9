"""What pydantic finds wrong with a setting, in the words of our errors."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

from capgap.schemas.errors import SettingError

# by the beginning of the kind of problem
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
    "missing": "a value",
}

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def error_of(problems: list[ErrorDetails]) -> SettingError:
    """The error for one setting, without its place; for one that may be of several kinds, what each of them takes."""
    first = problems[0]
    if first["type"] == "value_error":
        return SettingError(first["msg"].removeprefix("Value error, "))
    expected = " or ".join(dict.fromkeys(expected_of(problem) for problem in problems))
    is_alone = expected == "a list" and isinstance(first["input"], (str, int, float))
    return SettingError(
        "cannot be used",
        found=plain(first["input"]),
        expected=expected,
        fix=f"write [{first['input']}]" if is_alone else None,
    )


def expected_of(problem: ErrorDetails) -> str:
    """What should stand there."""
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


def plain(value: Any) -> str:
    """A value as YAML would show it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"settings by name: {', '.join(map(str, value))}" if value else "{}"
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, (list, tuple)) else str(value)
