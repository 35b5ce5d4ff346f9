"""Every block of code in README and docs is whole: Python compiles, shell and JSON parse, and so do included files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INCLUDE = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def _pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def _whole(page: Path) -> str:
    """The page with the files that it includes."""
    return INCLUDE.sub(lambda found: (DOCS / found[1]).read_text().rstrip("\n"), page.read_text())


def _blocks() -> Iterator[Any]:
    for page in _pages():
        for number, (_, language, text) in enumerate(FENCE.findall(_whole(page))):
            yield pytest.param(language, text, id=f"{page.relative_to(ROOT)}-{number}-{language}")


@pytest.mark.parametrize(("language", "text"), _blocks())
def test_a_block_is_whole(language: str, text: str) -> None:
    match language:
        case "python":
            ast.parse(text)
        case "sh":
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        case "json":
            # one value, spread over lines, or a record a line
            records = [text] if text.startswith("{\n") or text.count("\n{") == 0 else text.splitlines()
            assert [json.loads(record) for record in records]
        case "yaml":
            assert yaml.safe_load(text)
        case _:
            # output, a tree of folders, a file of another program, whose tags only that one knows
            assert language in ("", "bibtex", "console", "yml")


@pytest.mark.parametrize("page", _pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_line_that_includes_a_file_is_spelt_so_that_it_does(page: Path) -> None:
    meant = [line for line in page.read_text().splitlines() if re.search(r"-\s*8\s*<\s*-", line)]
    assert all(INCLUDE.fullmatch(line) for line in meant), meant
    assert all((DOCS / name).is_file() for name in INCLUDE.findall(page.read_text()))
