"""The base classes of all schemas, and the mark for settings that do not change results."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from capgap.schemas.secrets import require_no_credential

_MAX_INTEGER_BITS = 63
_SETTINGS_MODULES = ("run_", "law_grid", "interchange")
_OPERATIONAL = "capgap_operational"

OPERATIONAL: dict[str, Any] = {_OPERATIONAL: True}
"""``Field(json_schema_extra=OPERATIONAL)`` marks a setting that changes how a stage works, but not its result."""


class Entry(BaseModel):
    """The base of all models: frozen, and an unknown key is an error, so that a typing mistake never means a default.

    A manifest may hold a hundred thousand entries (files, shards), so an entry has no validator written in Python. The
    type of each field bounds its numbers instead, which pydantic checks in compiled code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class Record(Entry):
    """An entry whose values are checked by Python code before pydantic reads them."""

    @model_validator(mode="before")
    @classmethod
    def _require_usable(cls, values: Any) -> Any:
        """Refuse integers above 64 bits and, in settings, zero characters, credentials and a bool in place of a number.

        The first two would fail later, far from the setting at fault. Credentials are refused because settings are
        written into manifests.
        """
        if isinstance(values, dict):
            is_setting = any(base.__module__.rpartition(".")[2].startswith(_SETTINGS_MODULES) for base in cls.__mro__)
            for name, value in values.items():
                _require_usable(name, value, is_setting)
                if is_setting:
                    require_no_credential(str(name), value)
                    if name in cls.model_fields and _is_no_number(value, cls.model_fields[name].annotation):
                        raise ValueError(f"{name}: found {json.dumps(value, default=str)}, expected a number")
        return values

    def meant(self) -> dict[str, Any]:
        """Return the effective values of settings whose default depends on other settings, by name, as JSON values.

        `decisive` uses them, so that a run file that writes such a default out decides the same as one that leaves the
        setting out.
        """
        return {}

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the result, as plain JSON values.

        These are all settings that are not operational, each with its effective value (see `meant`).
        """
        dumped = self.model_dump(mode="json")
        fields = type(self).model_fields
        counted = {name: dumped[name] for name, info in fields.items() if name in dumped and not _is_operational(info)}
        return {name: _decisive_part(getattr(self, name), value) for name, value in counted.items()} | self.meant()


def _decisive_part(value: object, dumped: object) -> object:
    """Return a setting's JSON value; of a record, or of a mapping of records, only the decisive settings."""
    if isinstance(value, Record):
        return value.decisive()
    if isinstance(value, dict) and isinstance(dumped, dict):
        return {name: _decisive_part(value[name], part) for name, part in dumped.items() if name in value}
    return dumped


@dataclass(frozen=True)
class PartOf:
    """Marks a mapping that holds some of a record's settings: `Annotated[dict[str, Any], PartOf(TrainSettings)]`."""

    record: type[Record]


def below(error: ValidationError, *where: str | int) -> ValidationError:
    """Return the same validation error with `where` put before the location of each problem."""
    problems = [
        InitErrorDetails(type=e["type"], loc=(*where, *e["loc"]), input=e["input"], ctx=e.get("ctx", {}))
        for e in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, problems, hide_input=True)


def options_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: each member of a union by itself, and without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return options_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(kind for option in get_args(annotation) for kind in options_of(option))
    return (annotation,)


def _require_usable(name: object, value: object, is_setting: bool) -> None:
    """Raise ValueError for a value that no field may have.

    Only settings are checked for the character zero, because text that a model generated may hold it, and only their
    mappings are searched: those of a manifest may be large.
    """
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        # the number itself is not shown: Python refuses to print integers of several thousand digits
        raise ValueError(
            f"{name}: found an integer of {value.bit_length()} bits, expected at most {_MAX_INTEGER_BITS} and a sign"
        )
    if is_setting and isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name}: found {value[:80]!a}, expected text without the character zero")
    if isinstance(value, (list, tuple)):
        for one in value:
            _require_usable(name, one, is_setting)
    if is_setting and isinstance(value, Mapping):
        for key, one in value.items():
            _require_usable(name, key, is_setting)
            _require_usable(f"{name}.{key}", one, is_setting)


def _is_no_number(value: object, annotation: Any) -> bool:
    """Return whether a bool is given where a number is expected; pydantic would read it as 1 or 0."""
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
