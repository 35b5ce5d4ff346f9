"""The base of every model that is written down, and the mark for settings that do not change results."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo

_MAX_INTEGER_BITS = 63
_SETTINGS_MODULES = ("run_", "law_grid")
_OPERATIONAL = "capgap_operational"

OPERATIONAL: dict[str, Any] = {_OPERATIONAL: True}
"""``Field(json_schema_extra=OPERATIONAL)`` marks a setting that decides how a stage works, not what comes out."""


class Record(BaseModel):
    """Frozen, and an unknown key is an error: a typing mistake is never silently a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _require_usable(cls, values: Any) -> Any:
        """No number that 64 bits cannot hold, and no setting that no path can be: both would fail far from here."""
        if isinstance(values, dict):
            for name, value in values.items():
                _require_usable(name, value, cls.__module__.rpartition(".")[2].startswith(_SETTINGS_MODULES))
        return values

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, as plain JSON values: operational ones are left out."""
        values = self.model_dump(mode="json")
        return {
            name: _identity_of(getattr(self, name), values[name])
            for name, info in type(self).model_fields.items()
            if not _is_operational(info)
        }


def _require_usable(name: object, value: object, is_setting: bool) -> None:
    """Of a field's value; records within it look at their own. What a model wrote may hold any character."""
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        # its digits would be thousands, which Python does not write
        raise ValueError(f"{name}: found an integer of {value.bit_length()} bits, expected one of at most 64")
    if is_setting and isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name}: found {value[:80]!a}, expected text without the character zero")
    if isinstance(value, (list, tuple)):
        for one in value:
            _require_usable(name, one, is_setting)


def _identity_of(value: object, dumped: object) -> object:
    return value.decisive() if isinstance(value, Record) else dumped


def _is_operational(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(_OPERATIONAL))
