"""The notebook runs from a clean kernel on a tiny run's cache, and what is stored of it is what its cells make."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import NEEDED, settings_of

from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.run_file import RunFile

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "targets.ipynb"
_MOST_BYTES = 200_000


def _outputs(notebook: dict[str, Any]) -> list[set[str]]:
    """The kinds of output of each cell of code."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [{kind for one in cell["outputs"] for kind in one.get("data", {"text": 0})} for cell in cells]


def test_the_stored_notebook_was_run_in_order_and_is_small() -> None:
    stored = json.loads(NOTEBOOK.read_text())
    counts = [cell["execution_count"] for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert sum("image/png" in kinds for kinds in _outputs(stored)) == 4
    assert not re.search(r'"output_type": "error"', NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < _MOST_BYTES
    assert "site-packages" not in NOTEBOOK.read_text(), "a path of the machine that it was run on"


@pytest.mark.slow  # a kernel, and 200 steps of training
def test_the_notebook_runs_from_a_clean_kernel_after_the_quickstart(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    settings = settings_of(tmp_path, "notebook") | {"out": str(tmp_path / "runs" / "shards")}
    for instance in NEEDED[:3]:
        carry_out(RunFile.model_validate(settings), instance)
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    shutil.copy(NOTEBOOK, folder)
    notebook = nbformat.read(folder / NOTEBOOK.name, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=None, resources=resources).execute()
    assert _outputs(notebook) == _outputs(json.loads(NOTEBOOK.read_text()))
    said = "".join(one.get("text", "") for cell in notebook.cells for one in cell.get("outputs", []))
    before, after = map(float, re.findall(r"([\d.]+) nats/token before, ([\d.]+) after 200 steps", said)[0])
    assert after < before
