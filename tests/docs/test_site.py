"""The documentation builds without a warning, and its generated pages say what the schemas do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from capgap.schemas.run_file import RunFile

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_section_of_the_run_file_has_its_settings(site: Path) -> None:
    page = (site / "reference" / "settings" / "index.html").read_text()
    for name, info in RunFile.model_fields.items():
        assert f"<code>{name}</code>" in page
        assert info.description is not None
    assert "Peak learning rate." in page and "<em>operational</em>" in page


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
