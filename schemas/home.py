"""Paths that begin with the user's home folder, as a shell reads them: `~/runs`."""

from __future__ import annotations

import os
from typing import Any

from pydantic import AfterValidator


def with_home(value: Any) -> Any:
    """Return the value with the home folder in place of a leading `~` in every text, also within lists and mappings.

    A shell does this only for a whole argument, and not for values in a run file or behind `--out=`.
    """
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~") else value  # noqa: PTH111 (unknown users: unchanged)
    if isinstance(value, dict):
        return {name: with_home(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_home(one) for one in value])
    return value


PATH = AfterValidator(with_home)
"""`Annotated[str, PATH]` marks a setting that is a path, or that holds paths: `~` at its beginning is the home folder.

In all other settings `~` is a character like any other. The arguments of vLLM and of loggers count as paths, because
some of them are, and only they know which.
"""
