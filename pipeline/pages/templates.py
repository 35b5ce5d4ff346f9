"""Templates of pages: one file each, no script, nothing loaded from elsewhere, one style and one form of tables."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_SHARED = Path(__file__).parent


def page_template(path: Path) -> Template:
    """The template, which may include `style.html.j2` and import from `parts.html.j2`; every text put in is escaped."""
    environment = Environment(
        loader=FileSystemLoader([path.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(path.name)
