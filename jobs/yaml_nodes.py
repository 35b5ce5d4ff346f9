"""Reads untrusted YAML into plain values with the line of every key, with bounds on its size.

    bytes --nodes--> bounded in size, depth and expansion of aliases --> values, and the line of each

No tag is turned into an object, and no file can include another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from capgap.schemas.errors import InputError, SettingError

Loc = tuple[Any, ...]
"""The location of a value: names of settings and positions in lists, outermost first."""

# Real run files are far below: one with ten thousand sources has half a megabyte and 50,000 values, 10 levels deep.
_MAX_BYTES = 4 << 20
_MAX_VALUES = 60_000
_MAX_DEPTH = 32

_KINDS = {list: "a list", str: "text", int: "a number", float: "a number"}
_MAP, _LIST, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "merge"))


@dataclass(frozen=True)
class YamlDocument:
    """The content of a YAML file.

    Attributes:
        values: plain values by name.
        lines: line number of each value, counted from 1.
        bare: locations of names that have nothing after their colon.
        words: how each true or false is written in the file, for example `on` or `no`.
    """

    values: dict[Any, Any]
    lines: dict[Loc, int]
    bare: frozenset[Loc]
    words: dict[Loc, str] = field(default_factory=dict)


def read_document(path: Path) -> YamlDocument:
    """Read a file of settings by name.

    Raises:
        InputError: the file is not YAML in UTF-8, is too large, names a setting twice, or has tags, which would stand
            for objects.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    try:
        if len(data) > _MAX_BYTES:
            raise _TooLargeError(f"more than {_MAX_BYTES:,} bytes")
        builder = _Builder(data.decode())
        values = builder.build()
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
    except _TwiceError as error:
        raise InputError(
            "stands twice",
            where=f"{path}, line {error.line}: {dotted(error.loc)}",
            found=f"line {error.before} before",
            expected="each setting once",
            fix="take one of them out",
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = path if mark is None else f"{path}, line {mark.line + 1}, column {mark.column + 1}"
        raise InputError(
            "not a YAML file", where=where, found=_found(error), expected="YAML", fix=_fix(error)
        ) from None
    except yaml.YAMLError as error:
        raise InputError("not a YAML file", where=path, found=error, expected="YAML") from None
    if not isinstance(values, dict):
        raise InputError(
            "not a run file",
            where=path,
            found="nothing" if values is None else _KINDS.get(type(values), type(values).__name__),
            expected="settings by name",
            fix="`capgap init` writes one, and `capgap ls` lists examples",
        )
    return YamlDocument(values, builder.lines, frozenset(builder.bare), builder.words)


def parse_value(text: str, where: str, fix: str) -> Any:
    """Read a flag's value as YAML.

    Args:
        text: the value.
        where: the flag, for the error.
        fix: what to do, for the error.

    Raises:
        SettingError: the value is not YAML.
    """
    try:
        return _Builder(text).build()
    except _TwiceError as error:
        raise SettingError(
            "stands twice", where=f"{where}: {dotted(error.loc)}", expected="each setting once"
        ) from None
    except (yaml.YAMLError, _TooLargeError) as error:
        found = _problem(error) if isinstance(error, yaml.MarkedYAMLError) else error
        raise SettingError("not YAML", where=where, found=f"{text!r}: {found}", fix=fix) from None


def dotted(loc: Loc) -> str:
    """Return a location in dotted form, such as `train.loggers.0`."""
    return ".".join(map(str, loc))


def _problem(error: yaml.MarkedYAMLError) -> str:
    return re.sub(r"^(?:but )?found ", "", error.problem or error.context or "something else")


def _found(error: yaml.MarkedYAMLError) -> str:
    """Return Y of a problem that reads `expected X, but found Y`, or else the whole problem."""
    return re.sub(r"^expected .*, but (?:found|got) ", "", _problem(error))


def _fix(error: yaml.MarkedYAMLError) -> str | None:
    return "indent with spaces; YAML takes no tabs" if "'\\t'" in _problem(error) else None


class _TooLargeError(Exception):
    """The YAML is larger or deeper than any run file, also after its aliases are expanded."""


class _TwiceError(Exception):
    """A section has the same name twice."""

    def __init__(self, loc: Loc, line: int, before: int) -> None:
        self.loc, self.line, self.before = loc, line, before
        super().__init__(dotted(loc))


class _Loader(yaml.SafeLoader):
    """Composes nodes up to a bounded depth and number, because deeper ones would exhaust the stack."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node like SafeLoader, but raise an error beyond the bounds."""
        self._depth += 1
        self._num_nodes += 1
        if self._depth > _MAX_DEPTH:
            raise _TooLargeError(f"settings more than {_MAX_DEPTH} deep")
        if self._num_nodes > 2 * _MAX_VALUES:
            raise _TooLargeError(f"more than {_MAX_VALUES:,} values")
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


# Read 1e-3 as a number, like YAML 1.2 and as people expect; PyYAML would read it as text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Builder:
    """Turns nodes into values. An alias is expanded and counted at every place where it is used."""

    def __init__(self, text: str) -> None:
        self._loader = _Loader(text)
        self._num_values = 0
        self.lines: dict[Loc, int] = {}
        self.bare: set[Loc] = set()
        self.words: dict[Loc, str] = {}

    def build(self) -> Any:
        node = self._loader.get_single_node()
        return None if node is None else self._value(node, (), ())

    def _value(self, node: yaml.Node, loc: Loc, above: tuple[int, ...]) -> Any:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:
            raise _TooLargeError(f"more than {_MAX_VALUES:,} values, aliases spelt out")
        if id(node) in above:
            raise _TooLargeError(f"line {node.start_mark.line + 1}: an alias of what it stands in")
        if len(above) >= _MAX_DEPTH:
            raise _TooLargeError(f"settings more than {_MAX_DEPTH} deep, aliases spelt out")
        inside = (*above, id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return self._settings(node, loc, inside)
        if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
            return [self._item(item, (*loc, number), inside) for number, item in enumerate(node.value)]
        return self._scalar(node, loc)

    def _item(self, node: yaml.Node, loc: Loc, above: tuple[int, ...]) -> Any:
        self.lines.setdefault(loc, node.start_mark.line + 1)
        return self._value(node, loc, above)

    def _settings(self, node: yaml.MappingNode, loc: Loc, above: tuple[int, ...]) -> dict[Any, Any]:
        values: dict[Any, Any] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            name = self._name(key)
            inner, line = (*loc, name), key.start_mark.line + 1
            if name in values:
                raise _TwiceError(inner, line, self.lines[inner])
            self.lines.setdefault(inner, line)
            values[name] = self._value(value, inner, above)
        # settings written here override those that a merge key (<<) brings
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                raise _error("a merge of something else than settings by name", other)
            for name, value in self._value(other, loc, above).items():
                values.setdefault(name, value)
        return values

    def _name(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise _error("a list or settings in the place of a name", node)
        return self._scalar(node, None)

    def _scalar(self, node: yaml.Node, loc: Loc | None) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise _error(f"could not determine a constructor for the tag {node.tag!r}", node)
        try:
            value = self._loader.construct_object(node)
        except (ValueError, OverflowError) as error:  # an invalid date or number
            raise _error(str(error), node) from None
        if value is None and not node.value and loc is not None:
            self.bare.add(loc)
        if isinstance(value, bool) and loc is not None:
            self.words.setdefault(loc, node.value)
        return value


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
