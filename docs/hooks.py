"""Stops the build of the site where a page shows the line that should have included a file.

The extension that includes files takes the marker letter for letter, and lets every other spelling stand as text.
"""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError

_MARKER = re.compile(r"-{1,3}\s*8\s*(?:<|&lt;)\s*-")


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with each page as HTML.

    Raises:
        PluginError: an include was not resolved.
    """
    text = re.sub(r"<[^>]+>", "", html)  # a highlighter may have put tags inside the marker
    found = _MARKER.search(text)
    if found is not None:
        line = text[text.rfind("\n", 0, found.start()) + 1 :].partition("\n")[0]
        raise PluginError(
            f"{page.file.src_uri}: this line includes no file, for its marker is misspelt: {line.strip()}"
        )
    return html
