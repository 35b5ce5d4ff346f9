"""Which rates a plan takes, and what they are rates of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import settings_of

from capgap.pipeline.plan import Stated, make_plan
from capgap.pipeline.plan.calibrate import probed_figure
from capgap.pipeline.plan.probes import Rate
from capgap.pipeline.plan.rates import CALIBRATION_NAME
from capgap.pipeline.plan.work import work_of
from capgap.pipeline.workflow.state import states
from capgap.schemas.plan import Calibration, Figure, StagePlan
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
TRAIN = "train/distilled/seed-1"


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., dict[str, StagePlan]]:
    settings = settings_of(tmp_path, "rates")
    settings["corpus"]["teacher_fraction"] = 0.3
    base = settings | {"teacher": {"model": SHAPE}, "eval": {}}
    run = RunFile.model_validate(base)
    rates = {stage: Figure(value=10.0, source="probed: here") for stage in ("teacher", "cache", "train", "eval")}
    kept = Calibration(device="d", made="m", resolved=run.model_dump(mode="json"), tokens_per_s=rates)
    (tmp_path / CALIBRATION_NAME).write_text(kept.model_dump_json())

    def plan(stated: Stated = Stated(like=(str(tmp_path),)), **changes: Any) -> dict[str, StagePlan]:  # noqa: B008
        changed = {
            name: base[name] | value if isinstance(value, dict) and name in base else value
            for name, value in changes.items()
        }
        made = make_plan(RunFile.model_validate(base | changed), stated)
        return {stage.instance: stage for stage in made.stages}

    return plan


@pytest.mark.parametrize(("device", "rate"), [("cpu", 10.0), ("auto", 10.0), ("cuda", None)])
def test_a_rate_of_another_kind_of_device_is_not_used(
    planned: Callable[..., dict[str, StagePlan]], device: str, rate: float | None
) -> None:
    found = planned(device=device)
    assert {found[name].tokens_per_s.value for name in ("teacher", "cache", TRAIN, "eval")} == {rate}


@pytest.mark.parametrize(
    "changed", [{"compile": True}, {"num_devices": 8}, {"activation_checkpointing": True}, {"row_len": 64}]
)
def test_a_rate_of_a_training_with_other_settings_is_not_used(
    planned: Callable[..., dict[str, StagePlan]], changed: dict[str, Any]
) -> None:
    assert planned()[TRAIN].tokens_per_s.value == 10
    assert planned(train=changed)[TRAIN].tokens_per_s.value is None


def test_the_hours_of_a_training_are_those_of_all_its_devices(planned: Callable[..., dict[str, StagePlan]]) -> None:
    several = {"train": {"num_devices": 8}, "teacher": {"training": {"num_devices": 4}}}
    stated = Stated(train_tokens_per_s=50)
    one, eight = (planned(stated, **changes)[TRAIN] for changes in ({}, several))
    assert one.device_hours.value and eight.device_hours.value == pytest.approx(8 * one.device_hours.value)
    # operations are the same on any number of devices, which only share them
    peak = Stated(device_peak_tflops=0.5, mfu=0.2)
    alone, shared = planned(peak), planned(peak, **several)
    for name, number in (("teacher", 4), (TRAIN, 8)):
        assert shared[name].device_hours.value == pytest.approx(alone[name].device_hours.value)
        assert shared[name].tokens_per_s.value == pytest.approx(number * alone[name].tokens_per_s.value)


def test_a_teacher_beside_a_student_works_on_all_devices_of_the_training(
    planned: Callable[..., dict[str, StagePlan]],
) -> None:
    rates = Stated(teacher_tokens_per_s=100, train_tokens_per_s=400)
    found = planned(rates, train={"num_devices": 4, "targets": "online"})[TRAIN].tokens_per_s
    assert found.value == pytest.approx(1 / (1 / 400 + 1 / 400))
    assert "on 4 devices instead of 1" in found.source


def test_a_training_is_probed_on_one_device_and_its_rate_is_that_of_all(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "rates")
    run = RunFile.model_validate(settings | {"train": settings["train"] | {"num_devices": 8}})
    figure = probed_figure("train", work_of(run, states(run), None), {"train": Rate(100, 2.0)}, {}, "here")
    assert figure.value == 8 * 50 and figure.source.endswith("here, times 8 devices")


def test_an_evaluation_names_only_the_failures_of_the_models_that_it_measures(tmp_path: Path) -> None:
    run = RunFile.model_validate(settings_of(tmp_path, "rates") | {"eval": {"teacher": "cache"}})
    failed = {"cache": "no engine", "teacher": "no teacher", "student": "no student"}
    figure = probed_figure("eval", work_of(run, states(run), None), {}, failed, "here")
    assert figure.source == "could not be probed: no student"
