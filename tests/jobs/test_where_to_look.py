"""The last line of a run names what it has made, and nothing that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capgap.jobs.commands import where_to_look
from capgap.schemas.run_file import RunFile

MODEL = {"model": {"hidden_size": 32, "num_heads": 2}}
SHARDS: dict[str, Any] = {"corpus": {}, "teacher": {"path": "given"}, "cache": {}}
STUDENTS: dict[str, Any] = {**SHARDS, "student": MODEL, "train": {}}


@pytest.mark.parametrize(
    ("sections", "made", "said"),
    [
        (STUDENTS | {"eval": {}}, ["cache", "train", "report/report.html"], "report.html, in a browser"),
        (STUDENTS | {"eval": {}}, ["cache", "train"], "tensorboard --logdir"),
        (STUDENTS, ["cache", "train"], "tensorboard --logdir"),
        # stopped early, as with --only
        (STUDENTS, ["cache"], "capgap fidelity"),
        (SHARDS, ["cache"], "capgap fidelity"),
        (SHARDS, ["corpus"], None),
    ],
)
def test_what_to_look_at_is_there(sections: dict[str, Any], made: list[str], said: str | None, tmp_path: Path) -> None:
    for name in made:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("") if path.suffix else path.mkdir()
    found = where_to_look(RunFile.model_validate(sections | {"name": "run", "out": str(tmp_path)}))
    if said is None:
        assert found is None
    else:
        assert found is not None and found[0].exists()
        assert found[1].startswith("look next: ") and said in found[1]
