"""The command that installs an extra of capgap in the same way as capgap itself was installed."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import unquote, urlsplit

_NAME = "capgap"


def adding(extra: str) -> str:
    """Return the command, in backticks, that adds the packages of an extra to this installation.

    Args:
        extra: Name of an extra of capgap, for example `ray`.
    """
    try:
        origin = distribution(_NAME).read_text("direct_url.json")
    except PackageNotFoundError:
        origin = None
    return command(json.loads(origin) if origin else None, extra)


def command(origin: dict[str, Any] | None, extra: str) -> str:
    """Return the command, in backticks, for an installation of this origin.

    The command never names capgap alone: capgap is on no package index, so pip would install and run the package of
    anyone who registers the name there.

    Args:
        origin: Content of pip's `direct_url.json` (PEP 610), which says where capgap came from; None if there is none.
        extra: Name of an extra of capgap.
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
