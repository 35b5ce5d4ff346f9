"""Take pictures of pages as a phone and a desktop computer show them, in light and dark, for a reader to look at.

    python benchmarks/pictures.py FOLDER README.md runs/demo/report/report.html site/quickstart/index.html

A Markdown file is shown about as GitHub shows it. This needs chromium on the PATH, and fetches nothing.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
from pathlib import Path

WIDTHS = {"phone": 390, "desk": 1440}
SCHEMES = ("light", "dark")

# the sizes and colours of GitHub's repository pages that decide what fits and what is readable
_LIKE_GITHUB = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><base href="{base}"><style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1f2328; --line: #d1d9e0; --band: #f6f8fa; --link: #0969da; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #0d1117; --ink: #f0f6fc; --line: #3d444d; --band: #151b23; --link: #4493f8; }}
}}
body {{ max-width: 840px; margin: 0 auto; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; overflow-wrap: break-word; }}
a {{ color: var(--link); }}
h1, h2 {{ padding-bottom: .3em; border-bottom: 1px solid var(--line); }}
table {{ display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse; }}
th, td {{ padding: 6px 13px; border: 1px solid var(--line); }}
code {{ padding: .2em .4em; background: var(--band); font: 85% ui-monospace, monospace; }}
pre {{ padding: 16px; overflow: auto; background: var(--band); }}
pre code {{ padding: 0; }}
blockquote {{ margin: 0; padding: 0 1em; border-left: .25em solid var(--line); }}
img {{ max-width: 100%; }}
</style></head><body><main>
{body}
</main></body></html>
"""


def like_github(page: Path) -> str:
    """Return a Markdown file as a page of HTML, whose links and pictures are relative to the file."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    tokens = markdown.parse(page.read_text())
    for token, inside in itertools.pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug(inside.content))
    body = markdown.renderer.render(tokens, markdown.options, {})
    return _LIKE_GITHUB.format(title=page.name, base=f"{page.resolve().parent.as_uri()}/", body=body)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def main() -> None:
    """Parse the command line and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("pages", type=Path, nargs="+", help="files of HTML or Markdown")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("pictures.py: chromium is not installed; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for page, (device, width), scheme in itertools.product(args.pages, WIDTHS.items(), SCHEMES):
            shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            file = page
            if page.suffix == ".md":
                file = args.folder / f"{page.stem}.html"
                file.write_text(like_github(page))
            shown.goto(file.resolve().as_uri())
            name = page.parent.name if page.stem == "index" else page.stem
            shown.screenshot(path=args.folder / f"{name}-{device}-{scheme}.png", full_page=True)
            shown.close()
        browser.close()


if __name__ == "__main__":
    main()
