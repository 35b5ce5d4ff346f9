"""Links of pages that are read in the repository lead somewhere; those inside the site are checked when it is built."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
FENCED = re.compile(r"^( *)(```|~~~).*?^\1\2$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
# hosts of papers, formats and other programs; a test asks none of them whether the page is still there
OUTSIDE = {
    *("arxiv.org", "github.com", "datatracker.ietf.org", "arrow.apache.org"),
    *("keepachangelog.com", "semver.org", "citation-file-format.github.io"),
}


def _pages() -> list[str]:
    listed = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True)
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def _links(page: Path) -> list[str]:
    return [first or second for first, second in LINK.findall(FENCED.sub("", page.read_text()))]


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    # as GitHub makes them: a link counts with its words
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in plain}


def _is_made(name: str, path: str) -> bool:
    """Whether the site's build makes the page that a page of docs links to."""
    return name.startswith("docs/") and any(folder in path for folder in ("reference/", "notebooks/"))


@pytest.mark.parametrize("name", _pages())
def test_a_link_leads_to_a_file_and_a_heading_that_are_there(name: str) -> None:
    page, dead = ROOT / name, []
    for link in _links(page):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = page if not parts.path else page.parent / parts.path
        made = _is_made(name, parts.path) and not target.exists()  # when the site is built
        if not made and (not target.exists() or (parts.fragment and parts.fragment not in _anchors(target))):
            dead.append(link)
    assert dead == []


def test_a_link_out_of_the_repository_leads_to_a_known_host() -> None:
    links = {(name, link) for name in _pages() for link in _links(ROOT / name) if urlsplit(link).scheme}
    hosts = {(urlsplit(link).scheme, urlsplit(link).hostname) for _, link in links}
    assert hosts <= {("https", host) for host in OUTSIDE}
    assert {host for _, host in hosts} >= OUTSIDE, "no page names it any more"
