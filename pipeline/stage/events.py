"""Events: what a command reports while it works, as a line for people with a name and values for programs.

    event("shard", "cache: shard 3 of 10 ...", shard=2, tokens_per_s=1234.5)
    --> a record of the logger `capgap` --> a handler of the command line: text, or one JSON object a line

Names of events and of their fields are stable; docs/operations.md lists them. The current stage is kept once for the
whole process, because a process carries out one stage at a time.
"""

from __future__ import annotations

import logging
import time
from typing import Any

_LOG = logging.getLogger("capgap")
_stage = ""
_said_at_s = time.monotonic()


def silent_s() -> float:
    """Return the number of seconds since this process last reported an event."""
    return time.monotonic() - _said_at_s


def event(name: str, text: str, level: int = logging.INFO, /, **fields: Any) -> None:
    """Report an event to the log.

    Args:
        name: Name of the event, in snake_case.
        text: Line for people.
        level: Level of Python's logging.
        fields: Values for programs, which JSON must be able to hold; fields that are None are left out.
    """
    global _said_at_s
    _said_at_s = time.monotonic()
    known = {key: value for key, value in fields.items() if value is not None}
    # the text is passed as an argument, so that a per cent sign in it stays one
    _LOG.log(level, "%s", text, extra={"event": name, "fields": known})


def set_stage(name: str) -> None:
    """Set the instance that this process reports for, for example `train/distilled/seed-0`; empty for none."""
    global _stage
    _stage = name


def current_stage() -> str:
    """Return the instance that this process carries out; empty where it carries out none."""
    return _stage
