"""The tree and the table of CONTRIBUTING name the folders that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _tree() -> set[str]:
    """Folders of the tree, from the repository's root."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2]
    block = re.findall(r"^```\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)[0]
    found, parent = set(), ""
    for line in block.splitlines():
        names = re.findall(r"(\w+)/ ", line[:20])
        inner = line.startswith(" ")
        found |= {f"{parent}/{name}" if inner else name for name in names}
        parent = parent if inner else names[0]
    return found


def _folders(inside: Path) -> set[str]:
    found = {str(path.relative_to(ROOT)) for path in inside.iterdir() if path.is_dir()}
    return {name for name in found if not Path(name).name.startswith(("__", "."))}


def test_the_tree_has_every_folder_of_the_pipeline_and_the_kernels_and_no_other() -> None:
    tree = _tree()
    for part in ("pipeline", "kernels"):
        assert {name for name in tree if name.startswith(f"{part}/")} == _folders(ROOT / part)
    assert {name for name in tree if "/" not in name} == {
        *("schemas", "kernels", "pipeline", "jobs", "docker", "tests", "benchmarks", "docs")
    }


def test_ten_questions_are_answered_by_ten_folders_of_the_tree() -> None:
    rows = re.findall(r"^\| .*\? \| `([\w/]+)/` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows)) == 10
    assert set(rows) <= _tree()
