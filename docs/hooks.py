"""Hooks of the site's build: put generated pages into the navigation, and stop the build at a misspelt include.

The extension that includes files accepts only the exact marker, and leaves every other spelling in the page as text.
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

from capgap.jobs.registry import COMMANDS
from capgap.schemas.base import Record
from capgap.schemas.run_file import RunFile

_MARKER = re.compile(r"-{1,3}\s*8\s*(?:<|&lt;)\s*-")


def on_config(config: Any) -> Any:
    """Put the pages of commands and settings behind their index pages; mkdocs calls this before it builds anything."""
    made = {
        "reference/command-line.md": [
            {f"capgap {name}": f"reference/commands/{name.replace(' ', '-')}.md"} for name in COMMANDS
        ],
        "reference/settings.md": [{name: f"reference/settings/{name}.md"} for name in _sections()],
    }
    for group in config.nav:
        for title, entries in group.items():
            if isinstance(entries, list):
                group[title] = [_with_pages(entry, made) for entry in entries]
    return config


def _sections() -> list[str]:
    """Return the names of the run file's sections that have settings of their own."""
    return [name for name, info in RunFile.model_fields.items() if _has_record(info.annotation)]


def _has_record(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return True
    return any(_has_record(part) for part in getattr(annotation, "__args__", ()))


def _with_pages(entry: Any, made: dict[str, list[dict[str, str]]]) -> Any:
    ((title, path),) = entry.items()
    return {title: [{"Overview": path}, *made[path]]} if path in made else entry


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Check that no include was left in a page; mkdocs calls this with each page as HTML.

    Raises:
        PluginError: An include was not resolved.
    """
    text = re.sub(r"<[^>]+>", "", html)  # a highlighter may have put tags inside the marker
    found = _MARKER.search(text)
    if found is not None:
        line = text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]
        raise PluginError(f"{page.file.src_uri}: no file is included here, for the marker is misspelt: {line.strip()}")
    return html
