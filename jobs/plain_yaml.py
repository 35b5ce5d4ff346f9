"""A run file from a stranger: settings and nothing else, whatever it says.

    text --events--> bounded in size, depth and what its aliases stand for --safe_load--> values --> no name of a class

What turns YAML into objects comes after this: it would import whatever module a `class_path` names, and take hours over
a hundred aliases of aliases.
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, get_args

import yaml

from capgap.schemas.base import Record
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_file import RunFile

# A run file that names ten thousand sources is half a megabyte of fifty thousand values; none is ten deep.
_MAX_BYTES = 4 << 20
_MAX_VALUES = 200_000
_MAX_DEPTH = 32

# With these jsonargparse means a class to import, its arguments, or another file to read.
_NOT_SETTINGS = {"class_path", "init_args", "dict_kwargs", "__path__", "__default_config__"}


def require_plain(path: Path, record: type[Record] = RunFile) -> None:
    """Raise where a run file, or a file of another record's settings, is anything but settings by name.

    Raises:
        InputError: it is missing, no YAML, too large, or holds tags, which stand for objects.
        SettingError: it names a class, or another file in the place of settings.
    """
    if not path.is_file():
        raise InputError("no such run file", where=path, fix="see jobs/runs/demo.yaml for an example")
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise _TooLargeError(f"more than {_MAX_BYTES:,} bytes")
        _require_small(data)
        content = yaml.safe_load(data)
    except _TooLargeError as error:
        raise InputError("not a run file", where=path, found=error, expected="settings by name") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise InputError("not a YAML file", where=path, found=error, expected="YAML") from None
    if not isinstance(content, dict):
        raise InputError("not a run file", where=path, found=type(content).__name__, expected="settings by name")
    if "config" in content:
        raise SettingError("a run file cannot name another", where=f"{path}: config", found=content["config"])
    _require_no_class(path, content, "")
    _require_settings(path, content, record, "")


class _TooLargeError(ValueError):
    """Larger, deeper or more often repeated than any run file."""


def _require_small(data: bytes) -> None:
    """Count values as if every alias were spelt out, before anything is built."""
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(data, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > _MAX_DEPTH:
                raise _TooLargeError(f"settings more than {_MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _TooLargeError(f"an alias *{event.anchor} of what it stands in, or of nothing")
            anchor, size = None, sizes[event.anchor]
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        outer, so_far = open_nodes.pop()
        open_nodes.append((outer, so_far + size))
        if so_far + size > _MAX_VALUES:
            raise _TooLargeError(f"more than {_MAX_VALUES:,} values, aliases spelt out")


def _require_no_class(path: Path, value: object, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _require_no_class(path, item, where)
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{where}.{name}" if where else str(name)
            if name in _NOT_SETTINGS:
                raise SettingError("a run file cannot name a class", where=f"{path}: {inner}", found=item)
            _require_no_class(path, item, inner)


def _require_settings(path: Path, values: dict[str, Any], record: type[Record], where: str) -> None:
    """Text in the place of a group of settings would be taken for the name of another file."""
    for name, info in record.model_fields.items():
        group = _record_in(info.annotation)
        value = values.get(name)
        if group is None or value is None:
            continue
        inner = f"{where}.{name}" if where else name
        if not isinstance(value, dict):
            raise SettingError("not settings by name", where=f"{path}: {inner}", found=value)
        _require_settings(path, value, group, inner)


def _record_in(annotation: object) -> type[Record] | None:
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Record)), None)
