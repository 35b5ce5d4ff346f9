"""The command that adds an extra to capgap, in the way in which this capgap was installed."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import unquote, urlsplit

_NAME = "capgap"


def adding(extra: str) -> str:
    """What to run, to have the packages of an extra beside what is installed; the command stands in backticks.

    Args:
        extra: of capgap's, for example `ray`.
    """
    try:
        origin = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        origin = None
    return command(json.loads(origin) if origin else None, extra)


def command(origin: dict[str, Any] | None, extra: str) -> str:
    """The command, by what pip wrote down of where capgap came from (PEP 610), or None where it wrote nothing down.

    The name alone is never asked of a package index: capgap is on none, and whoever took the name there would be run.
    """
    if origin is None:
        return f"`pip install '.[{extra}]'` in capgap's clone"
    url = str(origin["url"])
    if "dir_info" in origin:
        flag = "-e " if origin["dir_info"].get("editable") else ""
        return f"`pip install {flag}{shlex.quote(f'{unquote(urlsplit(url).path)}[{extra}]')}`"
    if "vcs_info" in origin:
        url = f"{origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}"
    if "subdirectory" in origin:
        url += f"#subdirectory={origin['subdirectory']}"
    return f"`pip install {shlex.quote(f'{_NAME}[{extra}] @ {url}')}`"
