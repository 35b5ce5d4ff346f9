"""What a run has to do, as far as it is known from its file and from what is made already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import settings_of

from capgap.pipeline.plan.work import RunWork, work_of
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.state import states
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., RunFile]:
    settings = settings_of(tmp_path, "work")

    def make(**changes: Any) -> RunFile:
        return RunFile.model_validate(settings | changes)

    return make


def work(run: RunFile) -> RunWork:
    return work_of(run, states(run), None)


@pytest.mark.parametrize(
    ("before", "after"),
    [({"model": SHAPE}, {"model": SHAPE | {"num_layers": 4}}), ({"prune": {"intermediate_size": 16}}, {"prune": {}})],
)
def test_a_student_whose_settings_have_changed_is_counted_anew(
    run: Callable[..., RunFile], tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    made = run(student=before)
    for instance in (Instance("corpus"), Instance("teacher"), Instance("student", seed=1)):
        carry_out(made, instance)
    elsewhere = work(run(student=after, out=str(tmp_path / "elsewhere"))).student
    assert elsewhere.total != work(made).student.total
    assert work(run(student=after)).student.total == elsewhere.total


def test_any_student_that_is_made_tells_the_size_of_all(run: Callable[..., RunFile]) -> None:
    made = run(seeds=[0, 1])
    for instance in (Instance("corpus"), Instance("student", seed=1)):
        carry_out(made, instance)
    assert work(made).student.where == "its manifest"
