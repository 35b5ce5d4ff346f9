"""The settings of a record as a tree of dotted names: type, default and description of each."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from capgap.jobs.yaml_nodes import Loc, dotted
from capgap.schemas.base import PartOf, Record, options_of

_KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "settings by name"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One setting, or a section of settings.

    Attributes:
        loc: location of the setting.
        annotation: its type.
        info: its declaration in the record; None for an entry that the user names, such as an arm.
    """

    loc: Loc
    annotation: Any
    info: FieldInfo | None = None

    @property
    def name(self) -> str:
        """The dotted name of the setting."""
        return dotted(self.loc)

    @property
    def section(self) -> type[Record] | None:
        """The record whose settings the section holds; None if this is no section."""
        marks = [*(self.info.metadata if self.info else ()), *_marks(self.annotation)]
        if (part := next((mark for mark in marks if isinstance(mark, PartOf)), None)) is not None:
            return part.record
        kinds = options_of(self.annotation)
        return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Record)), None)

    @property
    def entry(self) -> Any:
        """Type of the entries, if this is a mapping whose names the user chooses; else None."""
        if self.section is not None:
            return None
        found = next((kind for kind in options_of(self.annotation) if get_origin(kind) is dict), None)
        return None if found is None else get_args(found)[1]

    @property
    def takes_text(self) -> bool:
        """Whether the setting is text, so that a flag's value is taken literally and not read as YAML."""
        return str in options_of(self.annotation)

    @property
    def kind(self) -> str:
        """The type and bounds of the setting, in plain words."""
        bounds = [
            f"{words} {getattr(mark, key):.10g}"
            for mark in (self.info.metadata if self.info else ())
            for key, words in _BOUNDS.items()
            if hasattr(mark, key)
        ]
        kinds = [_words(kind) for kind in options_of(self.annotation) if kind is not types.NoneType]
        return ", ".join([" or ".join(dict.fromkeys(kinds)), *bounds])

    @property
    def is_needed(self) -> bool:
        """Whether the setting has no default and must be given."""
        return self.info is not None and self.info.is_required()

    @property
    def default(self) -> str:
        """The default as a run file would write it; empty if there is none to show."""
        if self.info is None or self.info.default is PydanticUndefined or self.info.default is None:
            return ""
        value = list(self.info.default) if isinstance(self.info.default, tuple) else self.info.default
        if isinstance(value, Record):
            return ""
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")
        return re.sub(r"\.0e|e\+0*", "e", text)

    @property
    def sentences(self) -> str:
        """The description of the setting, in one line."""
        return " ".join(((self.info.description if self.info else None) or "").split())


def children(record: type[Record], loc: Loc = ()) -> Iterator[Setting]:
    """Iterate over the settings of a record."""
    for name, info in record.model_fields.items():
        yield Setting((*loc, name), info.annotation, info)


def all_settings(record: type[Record], loc: Loc = ()) -> Iterator[Setting]:
    """Iterate over the settings of a record and of its sections; a section comes before its settings."""
    for setting in children(record, loc):
        yield setting
        if setting.section is not None:
            yield from all_settings(setting.section, setting.loc)


def find(record: type[Record], loc: Loc) -> Setting | None:
    """Return the setting at a location; None if there is none."""
    found = Setting((), record)
    for number, part in enumerate(loc):
        here, section, entry = loc[: number + 1], found.section, found.entry
        if section is not None:
            if part not in section.model_fields:
                return None
            info = section.model_fields[part]
            found = Setting(here, info.annotation, info)
        elif entry is not None:
            found = Setting(here, entry)
        elif Any in options_of(found.annotation):
            found = Setting(here, Any)
        else:
            return None
    return found


def locate(record: type[Record], name: str, values: Any) -> Loc:
    """Return the location of a dotted name. Names in `values` that the user chose may contain dots themselves."""
    loc: Loc = ()
    rest = name
    while rest:
        setting = find(record, loc)
        part = rest.partition(".")[0]
        if setting is not None and setting.entry is not None and isinstance(values, dict):
            known = [str(key) for key in values if rest == str(key) or rest.startswith(f"{key}.")]
            part = max(known, key=len, default=part)
        loc, rest = (*loc, part), rest[len(part) + 1 :]
        values = values.get(part) if isinstance(values, dict) else None
    return loc


def _marks(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _words(kind: Any) -> str:
    """Return a type in plain words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin is Annotated:
        return _words(inner[0])
    if origin in (tuple, list):
        of = [option for part in inner if part is not Ellipsis for option in options_of(part)]
        return f"list of {' or '.join(dict.fromkeys(_PLURALS.get(one, _words(one)) for one in of))}"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, Record)):
        return "settings by name"
    return _KINDS.get(kind, "any value")
