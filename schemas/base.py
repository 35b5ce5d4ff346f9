"""The base of every model that is written down, and the mark for settings that do not change results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

_OPERATIONAL = "capgap_operational"

OPERATIONAL: dict[str, Any] = {_OPERATIONAL: True}
"""``Field(json_schema_extra=OPERATIONAL)`` marks a setting that decides how a stage works, not what comes out."""


class Record(BaseModel):
    """Frozen, and an unknown key is an error: a typing mistake is never silently a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the result, as plain JSON values: operational ones are left out."""
        values = self.model_dump(mode="json")
        return {
            name: _identity_of(getattr(self, name), values[name])
            for name, info in type(self).model_fields.items()
            if not _is_operational(info)
        }


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
    return ValidationError.from_exception_data(error.title, problems)


def _identity_of(value: object, dumped: object) -> object:
    return value.decisive() if isinstance(value, Record) else dumped


def _is_operational(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get(_OPERATIONAL))
