"""The last line of a run names what it has made, and nothing that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_folders import finish_folder

from capgap.jobs.commands import where_to_look
from capgap.pipeline.workflow.graph import instances
from capgap.schemas.run_file import RunFile

MODEL = {"model": {"hidden_size": 32, "num_heads": 2}}
SHARDS: dict[str, Any] = {"corpus": {}, "teacher": {"path": "given"}, "cache": {}}
STUDENTS: dict[str, Any] = {**SHARDS, "student": MODEL, "train": {}}


@pytest.mark.parametrize(
    ("sections", "made", "said"),
    [
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


def test_a_report_is_shown_as_long_as_it_is_of_what_is_there(tmp_path: Path) -> None:
    values = STUDENTS | {"eval": {}, "name": "run", "out": str(tmp_path)}
    run = RunFile.model_validate(values)
    for instance in instances(run):
        finish_folder(run, instance.name, file="report.html" if instance.stage == "report" else "result.txt")
    page = tmp_path / "report" / "report.html"
    assert where_to_look(run) == (
        page,
        f"look next: {page}, in a browser; every figure is in {tmp_path / 'eval' / 'results.json'}",
    )
    changed = RunFile.model_validate(values | {"train": {"learning_rate": 0.5}})
    finish_folder(changed, "train/distilled/seed-0", "other")
    found = where_to_look(changed)
    assert found is not None and found[0] == page
    assert f"{page} shows earlier results (input" in found[1] and "`capgap run` makes it again" in found[1]
