"""What a run has to do, as far as it is known from its file and from what is made already."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(("precision", "each"), [("32-true", 4), ("bf16-mixed", 4), ("bf16-true", 2)])
def test_models_and_checkpoints_are_as_large_as_the_precision_of_their_training(
    run: Callable[..., RunFile], precision: str, each: int
) -> None:
    training = {"precision": precision}
    arms = {"distilled": {"precision": precision}, "other": {}}
    done = work(run(teacher={"model": SHAPE, "training": training}, tune={"sources": ["x"]} | training, arms=arms))
    teacher, student = done.teacher.total, done.student.total
    assert teacher is not None and student is not None
    for stage, arm, size in (
        ("teacher", None, teacher),
        ("train", "distilled", student),
        ("tune", None, student),
    ):
        assert done.disk_bytes(stage, arm).value == size * each
        # weights and two moments; two checkpoints are kept while the third is written
        assert done.scratch_bytes(stage, arm).value == size * each * 3 * 3
    assert done.disk_bytes("train", "other").value == done.disk_bytes("student").value == student * 4


def test_the_kept_checkpoints_and_one_more_need_room(run: Callable[..., RunFile]) -> None:
    done = work(run(arms={"distilled": {"keep_checkpoints": 4}}))
    assert done.student.total is not None
    assert done.scratch_bytes("train", "distilled").value == done.student.total * 12 * 5


@pytest.mark.parametrize("student", [{"path": "given"}, {"prune": {}}])
def test_a_student_that_comes_from_a_model_is_saved_in_that_model_s_dtype(
    run: Callable[..., RunFile], tmp_path: Path, student: dict[str, Any]
) -> None:
    config = tmp_path / "given" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    given = run(student={name: str(config.parent) if name == "path" else value for name, value in student.items()})
    done = work(given)
    assert done.student.total is not None
    assert done.disk_bytes("student").value == done.student.total * 2
    for instance in (Instance("corpus"), Instance("teacher"), Instance("student", seed=1)):
        carry_out(given, instance)
    assert work(given).disk_bytes("student").value == done.disk_bytes("student").value
