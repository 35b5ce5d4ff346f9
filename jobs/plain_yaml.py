"""A run file from a stranger: settings and nothing else, whatever it says.

    text --events--> bounded in size, depth and what its aliases stand for --safe_load--> values --> no name of a class

What turns YAML into objects comes after this: it would import whatever module a `class_path` names, and take hours over
a hundred aliases of aliases.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from capgap.jobs.run_file_check import require_settings
from capgap.schemas.base import Record
from capgap.schemas.errors import InputError, SettingError
from capgap.schemas.run_file import RunFile

# A run file that names ten thousand sources is half a megabyte of fifty thousand values; none is ten deep.
_MAX_BYTES = 4 << 20
_MAX_VALUES = 200_000
_MAX_DEPTH = 32

_KINDS = {list: "a list", str: "text", int: "a number", float: "a number"}

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
        data.decode()
        _require_small(data)
        content, document = yaml.safe_load(data), yaml.compose(data, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(
            "not UTF-8",
            where=f"{path}, byte {error.start}",
            found=f"0x{data[error.start]:02x}",
            expected="text in UTF-8",
            fix="save it as UTF-8",
        ) from None
    except _TooLargeError as error:
        raise InputError("not a run file", where=path, found=error, expected="settings by name") from None
    except yaml.MarkedYAMLError as error:
        raise _no_yaml(path, error) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise InputError("not a YAML file", where=path, found=error, expected="YAML") from None
    if not isinstance(content, dict):
        raise InputError(
            "not a run file",
            where=path,
            found="nothing" if content is None else _KINDS.get(type(content), type(content).__name__),
            expected="settings by name",
            fix="see jobs/runs/demo.yaml for an example",
        )
    if "config" in content:
        raise SettingError(
            "a run file cannot name another",
            where=f"{path}: config",
            found=content["config"],
            expected="settings alone",
            fix="copy its settings into this one",
        )
    _require_no_class(path, content, "")
    assert document is not None  # there are values
    require_settings(path, document, content, record)


def _no_yaml(path: Path, error: yaml.MarkedYAMLError) -> InputError:
    mark = error.problem_mark or error.context_mark
    where = path if mark is None else f"{path}, line {mark.line + 1}, column {mark.column + 1}"
    problem = error.problem or error.context or "something else"
    fix = "indent with spaces; YAML takes no tabs" if "'\\t'" in problem else None
    return InputError("not a YAML file", where=where, found=problem.removeprefix("found "), expected="YAML", fix=fix)


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


def _is_logger(item: object) -> bool:
    """A logger by its name, or one of Lightning's; any other class can be named by a flag, which no stranger writes."""
    if not isinstance(item, dict) or not item.keys() <= {"class_path", "init_args"}:
        return False
    name = item.get("class_path")
    return isinstance(name, str) and ("." not in name or name.startswith("lightning.pytorch.loggers."))


def _require_no_class(path: Path, value: object, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            is_logger = where.endswith(".loggers") and _is_logger(item)
            _require_no_class(path, item.get("init_args") if is_logger else item, where)
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{where}.{name}" if where else str(name)
            if name in _NOT_SETTINGS:
                raise SettingError(
                    "a run file cannot name a class",
                    where=f"{path}: {inner}",
                    found=item,
                    expected="settings; in train.loggers a logger's name, or a class of lightning.pytorch.loggers",
                    fix="give a class of your own by a flag, as in --train.loggers",
                )
            _require_no_class(path, item, inner)
