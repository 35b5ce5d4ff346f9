"""The pages as a browser shows them: on a phone, a tablet and a desk, light, dark and printed, and to axe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.law.page import write_page
from capgap.pipeline.report import stage
from capgap.schemas.law_fit import LawFit

pytest.importorskip("playwright")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

MEASURED_LAW = Path(__file__).parents[3] / "docs/results/law-cpu/law.json"
A4_PX = 718  # at 96 dots an inch, between margins of 1 cm


@pytest.fixture(scope="module", params=["run", "law"])
def file(request, tmp_path_factory, make_context) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "law":
        return write_page(folder, LawFit.model_validate_json(MEASURED_LAW.read_bytes()))
    losses = {"cross_entropy": [3.53, 3.56], "distilled": [3.50, 3.52], "an_arm_with_quite_a_long_name": [3.51, 3.52]}
    context = make_context(folder, losses, recordings={"sampled": 50, "topk": 64})
    stage.run(context)
    return context.folder / stage.PAGE_NAME


@dataclass
class Shown:
    page: Page
    said: list[str] = field(default_factory=list)
    asked_for: list[str] = field(default_factory=list)


def show(browser: Browser, file: Path, width: int = 1280, **look: Any) -> Shown:
    shown = Shown(browser.new_page(viewport={"width": width, "height": 800}, **look))
    shown.page.on("console", lambda message: shown.said.append(message.text))
    shown.page.on("pageerror", lambda error: shown.said.append(str(error)))
    shown.page.on("request", lambda request: shown.asked_for.append(request.url))
    shown.page.goto(file.as_uri())
    return shown


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_a_page_fits_every_width_is_silent_and_asks_for_nothing(browser, file, width, tmp_path):
    shown = show(browser, file, width)
    page = shown.page
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # nothing that a chart says is cut off by its edge
    cut = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart text')].filter(text => {
            const own = text.getBoundingClientRect(), all = text.closest('svg').getBoundingClientRect()
            return own.left < all.left - 1 || own.right > all.right + 1
                || own.top < all.top - 1 || own.bottom > all.bottom + 1
        }).map(text => text.textContent)"""
    )
    assert cut == []
    # and no two words beside each other run together
    together = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].flatMap(chart => {
            const words = [...chart.querySelectorAll('text')]
            const all = words.map(text => [text.textContent, text.getBoundingClientRect()])
            return all.flatMap(([left, a]) => all.filter(([, b]) =>
                a.left < b.left && b.left < a.right && Math.abs(a.top - b.top) < 1).map(([right]) => [left, right]))
        })"""
    )
    assert together == []
    assert len(page.screenshot(path=tmp_path / "page.png", full_page=True)) > 10_000
    assert shown.said == []
    assert shown.asked_for == [file.as_uri()]
    page.close()


def test_a_chart_can_be_read_on_a_phone(browser, file):
    page = show(browser, file, 360).page
    heights = page.eval_on_selector_all("svg.chart text", "all => all.map(one => one.getBoundingClientRect().height)")
    # the height of a line is 1.16 of the letters' size; names beside marks are the smallest, of 7 pixels
    assert len(heights) > 20 and min(heights) > 7
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_amiss(browser, file, scheme):
    page = show(browser, file, 800, color_scheme=scheme).page
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    found = Axe().run(page).response
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]] == []
    assert "color-contrast" in {one["id"] for one in found["passes"]}
    page.close()


def test_dark_and_light_differ_and_print_is_dark_on_white(browser, file):
    colors = {}
    for name, look in {"light": {}, "dark": {"color_scheme": "dark"}, "print": {"color_scheme": "dark"}}.items():
        page = show(browser, file, **look).page
        if name == "print":
            page.emulate_media(media="print")
        colors[name] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
    assert colors["light"] != colors["dark"]
    assert colors["print"] == "rgb(255, 255, 255)"


def test_on_paper_every_table_is_whole_and_stands_open(browser, file):
    page = show(browser, file, A4_PX).page
    visible = "all => all.map(one => one.checkVisibility())"
    assert not all(page.eval_on_selector_all("details table", visible))
    page.emulate_media(media="print")
    assert all(page.eval_on_selector_all("details table", visible))
    too_wide = page.eval_on_selector_all(
        "table",
        f"all => all.filter(one => one.getBoundingClientRect().right > {A4_PX}).map(one => one.innerText)",
    )
    assert too_wide == []
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
