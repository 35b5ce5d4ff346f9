"""Paths that begin with the user's home folder, as a shell reads them: `~/runs`."""

from __future__ import annotations

import os
from typing import Any


def with_home(value: Any) -> Any:
    """The value with each text in it that begins with `~`, and names a home folder so, as the path that is meant.

    A shell does so with what stands alone; a run file, and what follows `--out=`, no shell has seen.
    """
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111 (a text, if it names none)
    if isinstance(value, dict):
        return {name: with_home(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_home(one) for one in value])
    return value
