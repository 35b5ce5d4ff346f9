"""The base of every model that is written down, and the mark for settings that do not change results."""

from __future__ import annotations

import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from capgap.schemas.home import with_home
from capgap.schemas.secrets import require_no_credential

_MAX_INTEGER_BITS = 63
_SETTINGS_MODULES = ("run_", "law_grid", "interchange")
_OPERATIONAL = "capgap_operational"

OPERATIONAL: dict[str, Any] = {_OPERATIONAL: True}
"""``Field(json_schema_extra=OPERATIONAL)`` marks a setting that decides how a stage works, not what comes out."""


class Entry(BaseModel):
    """Frozen, and an unknown key is an error: a typing mistake is never silently a default.

    The base of what a manifest has a hundred thousand of. Every number of an entry is bounded by its own type, which
    is checked without a step of Python's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class Record(Entry):
    """An entry whose values are looked at before they are taken."""

    @model_validator(mode="before")
    @classmethod
    def _require_usable(cls, values: Any) -> Any:
        """No number that 64 bits cannot hold, and no setting that no path can be: both would fail far from here.

        No setting holds a credential: whatever is set is written into manifests. A path may begin with `~`.
        """
        if isinstance(values, dict):
            is_setting = any(base.__module__.rpartition(".")[2].startswith(_SETTINGS_MODULES) for base in cls.__mro__)
            for name, value in values.items():
                _require_usable(name, value, is_setting)
                if is_setting:
                    require_no_credential(str(name), value)
                    if name in cls.model_fields and _is_no_number(value, cls.model_fields[name].annotation):
                        raise ValueError(f"{name}: found {json.dumps(value, default=str)}, expected a number")
            return {name: with_home(value) for name, value in values.items()} if is_setting else values
        return values

    def meant(self) -> dict[str, Any]:
        """Settings that mean something else than what stands there, by name, as plain JSON values.

        They are the ones that may be left out and whose default depends on other settings, so that a run file that
        spells the default out decides the same as one that does not.
        """
        return {}

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, as plain JSON values.

        The rule is one for all records: every setting that is not operational, with the value that it means.
        """
        dumped = self.model_dump(mode="json")
        fields = type(self).model_fields
        counted = {name: dumped[name] for name, info in fields.items() if name in dumped and not _is_operational(info)}
        return {name: _decisive_part(getattr(self, name), value) for name, value in counted.items()} | self.meant()


def _decisive_part(value: object, dumped: object) -> object:
    """A setting that is a record, or records by name, with its own decisive settings alone."""
    if isinstance(value, Record):
        return value.decisive()
    if isinstance(value, dict) and isinstance(dumped, dict):
        return {name: _decisive_part(value[name], part) for name, part in dumped.items() if name in value}
    return dumped


@dataclass(frozen=True)
class PartOf:
    """Marks settings by name that are some of a record's: `Annotated[dict[str, Any], PartOf(TrainSettings)]`."""

    record: type[Record]


def below(error: ValidationError, *where: str | int) -> ValidationError:
    """The same problems, of settings that stand below that place."""
    problems = [
        InitErrorDetails(type=e["type"], loc=(*where, *e["loc"]), input=e["input"], ctx=e.get("ctx", {}))
        for e in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, problems, hide_input=True)


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows: those of a union each by itself, without what `Annotated` adds."""
    if get_origin(annotation) is Annotated:
        return options_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for option in get_args(annotation) for kind in options_of(option))
    return (annotation,)


def _require_usable(name: object, value: object, is_setting: bool) -> None:
    """Refuse a value that no field may have. Records within it check theirs; what a model wrote may hold anything."""
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        # its digits would be thousands, which Python does not write
        raise ValueError(f"{name}: found an integer of {value.bit_length()} bits, expected one of at most 64")
    if is_setting and isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name}: found {value[:80]!a}, expected text without the character zero")
    if isinstance(value, (list, tuple)):
        for one in value:
            _require_usable(name, one, is_setting)


def _is_no_number(value: object, annotation: Any) -> bool:
    """Whether true or false stands where a number is meant, which pydantic would take for 1 or 0."""
    options = options_of(annotation)
    if isinstance(value, bool):
        words = {type(word) for one in options if get_origin(one) is Literal for word in get_args(one)}
        kinds = words.union(options)
        return bool not in kinds and not kinds.isdisjoint((int, float))
    for one in options:
        if isinstance(value, (list, tuple)) and get_origin(one) in (tuple, list):
            return any(_is_no_number(item, get_args(one)[0]) for item in value)
        if isinstance(value, dict) and get_origin(one) is dict:
            return any(_is_no_number(item, get_args(one)[1]) for item in value.values())
    return False


def _is_operational(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(_OPERATIONAL))
