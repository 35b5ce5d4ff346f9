"""What a command says while it works: a line for people, with a name and values for programs.

    event("shard", "cache: shard 3 of 10 ...", shard=2, tokens_per_s=1234.5)
    --> a record of the logger `capgap` --> a handler of the command line: text, or one JSON object a line

Names of events and of their fields are stable; docs/operations.md lists them. Which stage speaks is known to all of
the process, for a process carries out one stage.
"""

from __future__ import annotations

import logging
import time
from typing import Any

_LOG = logging.getLogger("capgap")
_stage = ""
_said_at_s = time.monotonic()


def silent_s() -> float:
    """Seconds since this process said something."""
    return time.monotonic() - _said_at_s


def event(name: str, text: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Say something.

    Args:
        name: of the event, in snake_case.
        text: the line for people.
        level: of logging.
        fields: values for programs, as JSON knows them; those that are None are left out.
    """
    global _said_at_s
    _said_at_s = time.monotonic()
    known = {key: value for key, value in fields.items() if value is not None}
    # an argument, so that a per cent sign in the text stays one
    _LOG.log(level, "%s", text, extra={"event": name, "fields": known})


def set_stage(name: str) -> None:
    """From here on this process speaks for that instance, for example `train/distilled/seed-0`; empty for none."""
    global _stage
    _stage = name


def current_stage() -> str:
    """The instance that this process carries out; empty where it carries out none."""
    return _stage
