"""A run file's settings one by one, with the line that each stands on.

    nodes, values --> no key twice --> every key a setting --> every value of its kind and within its bounds

What comes after this sees the file and the flags together, knows no lines, and speaks of what contradicts.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from capgap.jobs.problems import error_of, plain
from capgap.schemas.base import Record
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_train import TrainSettings

_Lines = dict[str, int]


def require_settings(path: Path, document: yaml.Node, content: dict[Any, Any], record: type[Record] = RunFile) -> None:
    """Raise at the first thing that is no setting of a run file, or of another record.

    Raises:
        InputError: a key stands twice.
        SettingError: a key is no setting, or its value is not of its kind.
    """
    lines: _Lines = {}
    _require_keys_once(path, document, "", lines, ())
    _Check(path, lines, record).group(record, content, "")


def _require_keys_once(path: Path, node: yaml.Node, where: str, lines: _Lines, above: tuple[int, ...]) -> None:
    if not isinstance(node, yaml.MappingNode) or id(node) in above:
        return
    for key, value in node.value:
        inner = f"{where}.{key.value}" if where else str(key.value)
        line = key.start_mark.line + 1
        if inner in lines and key.value != "<<":
            raise InputError(
                "stands twice",
                where=f"{path}, line {line}: {inner}",
                found=f"line {lines[inner]} before",
                expected="each setting once",
                fix="take one of them out",
            )
        lines[inner] = line
        _require_keys_once(path, value, inner, lines, (*above, id(node)))


class _Check:
    def __init__(self, path: Path, lines: _Lines, record: type[Record]) -> None:
        self._path, self._lines, self._record = path, lines, record

    def group(self, record: type[Record], values: dict[Any, Any], where: str) -> None:
        """Settings by name."""
        for name, value in values.items():
            inner = f"{where}.{name}" if where else str(name)
            if name not in record.model_fields:
                raise self._unknown(record, name, value, inner)
            if not where and name == "arms" and isinstance(value, dict):
                self._each(TrainSettings, value, inner)
                continue
            self._setting(record.model_fields[name], value, inner)

    def _setting(self, info: FieldInfo, value: Any, where: str) -> None:
        group, many = _record_in(info.annotation), _record_by_name(info.annotation)
        if group is not None and isinstance(value, dict):
            self.group(group, value, where)
        elif group is not None and value is not None:
            fix = f"write {{path: {value}}}" if isinstance(value, str) and "path" in group.model_fields else None
            raise self._at(
                where, SettingError("cannot be used", found=plain(value), expected="settings by name", fix=fix)
            )
        elif many is not None and isinstance(value, dict):
            self._each(many, value, where)
        else:
            self._value(info, value, where)

    def _each(self, record: type[Record], values: dict[Any, Any], where: str) -> None:
        for name, value in values.items():
            inner = f"{where}.{name}"
            if not isinstance(value, dict):
                fix = f"write {name}: {{}} for none" if value is None else None
                raise self._at(
                    inner, SettingError("cannot be used", found=plain(value), expected="settings by name", fix=fix)
                )
            self.group(record, value, inner)

    def _value(self, info: FieldInfo, value: Any, where: str) -> None:
        if isinstance(value, float) and not -float("inf") < value < float("inf"):
            raise self._at(where, SettingError("cannot be used", found=value, expected="a number that is finite"))
        try:
            setting: Any = Annotated[info.annotation, Field(), *info.metadata]
            TypeAdapter(setting).validate_python(value)
        except ValidationError as error:
            raise self._at(where, error_of(error.errors())) from None

    def _unknown(self, record: type[Record], name: Any, value: Any, where: str) -> SettingError:
        near = difflib.get_close_matches(str(name), record.model_fields, n=1)
        elsewhere = [full for full in _names(self._record, "") if full.rpartition(".")[2] == name]
        if near:
            fix = f"did you mean {near[0]}?"
        elif elsewhere:
            fix = f"did you mean {' or '.join(elsewhere[:3])}?"
        else:
            fix = f"there are {', '.join(record.model_fields)}"
        return self._at(where, SettingError("no such setting", found=plain(value), fix=fix))

    def _at(self, where: str, error: SettingError) -> SettingError:
        """The same error, with file and line."""
        name, line = where, self._lines.get(where)
        while line is None and "." in name:
            # what a merge key or an alias brings has no line of its own
            name = name.rpartition(".")[0]
            line = self._lines.get(name)
        place = f"{self._path}: {where}" if line is None else f"{self._path}, line {line}: {where}"
        return SettingError(error.what, where=place, found=error.found, expected=error.expected, fix=error.fix)


def _names(record: type[Record], where: str) -> Iterator[str]:
    for name, info in record.model_fields.items():
        inner, group = f"{where}.{name}" if where else name, _record_in(info.annotation)
        yield inner
        if group is not None:
            yield from _names(group, inner)


def _record_in(annotation: Any) -> type[Record] | None:
    """The record that a setting is, perhaps beside null."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Record)), None)


def _record_by_name(annotation: Any) -> type[Record] | None:
    """Of a setting that is records by a name of the user's."""
    if get_origin(annotation) is not dict:
        return None
    _, value = get_args(annotation)
    return value if isinstance(value, type) and issubclass(value, Record) else None
