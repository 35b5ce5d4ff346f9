"""The documentation builds without a warning, and its generated pages say what the schemas do."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from capgap.jobs.registry import COMMANDS
from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[2]


def test_every_section_of_the_run_file_has_its_settings(site: Path) -> None:
    page = (site / "reference" / "settings" / "index.html").read_text()
    for name, info in RunFile.model_fields.items():
        assert f"<code>{name}</code>" in page
        assert info.description is not None
    assert "<em>operational</em>" in page
    assert "Peak learning rate." in (site / "reference" / "settings" / "train" / "index.html").read_text()


def test_every_command_and_every_message_has_its_place(site: Path) -> None:
    for name, command in COMMANDS.items():
        page = (site / "reference" / "commands" / name.replace(" ", "-") / "index.html").read_text()
        assert f"capgap {name}" in page and "argument" in page, command.help
    messages = (site / "reference" / "messages" / "index.html").read_text()
    assert "teacher and corpus have different tokenizers" in messages and "no such setting" in messages


@pytest.mark.parametrize("marker", ['--8<-- "x.py"', '--8 < -- "x.py"', "-8&lt;- 'x.py'"])
def test_a_page_that_shows_the_line_of_an_include_stops_the_build(marker: str) -> None:
    errors = pytest.importorskip("mkdocs.exceptions")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="how-to/x.md"))
    with pytest.raises(errors.PluginError, match=r"how-to/x\.md: no file is included"):
        hooks.on_page_content(f"<pre><span>{marker.replace('<', '&lt;')}</span></pre>", page)
    assert hooks.on_page_content("<p>8 and - 3 &lt; 4</p>", page)


def test_the_python_api_comes_from_the_docstrings(site: Path) -> None:
    page = (site / "reference" / "api" / "index.html").read_text()
    known = ["open_cache", "DistillationLoss", "RunResult", "MemberDecoder", "linear_sparse_kl", "SequenceLoader"]
    for name in (*known, "CorruptError"):
        assert name in page


def test_examples_stand_in_the_pages_that_include_them(site: Path) -> None:
    included = {
        page: re.findall(r'^--8<-- "examples/([a-z_]+\.py)"$', page.read_text(), re.MULTILINE)
        for page in (ROOT / "docs").rglob("*.md")
    }
    assert {name for names in included.values() for name in names} == {
        path.name for path in (ROOT / "docs" / "examples").glob("*.py")
    }
    for page, names in included.items():
        built = site / page.relative_to(ROOT / "docs").with_suffix("") / "index.html"
        for name in names:
            # the docstring's usage line, as it is nowhere else
            assert f"python {name}" in re.sub(r"<[^>]+>", "", built.read_text())


def test_a_page_asks_nothing_of_other_hosts(site: Path) -> None:
    wanted = re.compile(
        r"""<(?:script|img|iframe)[^>]+src=["'](?:https?:)?//|<link[^>]+stylesheet[^>]+href=["']https?:"""
    )
    assert [str(page.relative_to(site)) for page in site.rglob("*.html") if wanted.search(page.read_text())] == []
