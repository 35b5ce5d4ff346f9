"""README and pages of the site as a browser shows them: on a phone and a desk, light and dark, and to axe."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("playwright")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

ROOT = Path(__file__).parents[2]
# prose and a drawing; commands; the widest tables; a page of many kinds of blocks
PAGES = ["README.md", "index.html", "quickstart", "reference/settings/train", "reference/commands/run", "format"]


@pytest.fixture(scope="module", params=PAGES)
def file(request: pytest.FixtureRequest, site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "README.md":
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(ROOT / "benchmarks"))
            page = tmp_path_factory.mktemp("readme") / "README.html"
            page.write_text(importlib.import_module("pictures").like_github(ROOT / "README.md"))
            return page
    found = site / request.param
    return found if found.is_file() else found / "index.html"


@pytest.mark.parametrize("width", [390, 1440])
def test_a_page_is_no_wider_than_the_screen(browser: Browser, file: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width > 1000 and file.name == "README.html":  # on a desk nobody scrolls to read what a command does
        blocks = page.eval_on_selector_all("pre", "all => all.map(one => [one.scrollWidth, one.clientWidth])")
        assert blocks and all(wide <= room for wide, room in blocks)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_amiss(browser: Browser, file: Path, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme=scheme)
    page.goto(file.as_uri())
    found = Axe().run(page).response
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]][:6]) for one in found["violations"]] == []
    page.close()
