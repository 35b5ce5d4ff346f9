"""Which rates a plan takes, and what they are rates of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import settings_of

from capgap.pipeline.plan import Stated, make_plan
from capgap.pipeline.plan.rates import CALIBRATION_NAME
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


@pytest.mark.parametrize("changed", [{"compile": True}, {"activation_checkpointing": True}, {"row_len": 64}])
def test_a_rate_of_a_training_with_other_settings_is_not_used(
    planned: Callable[..., dict[str, StagePlan]], changed: dict[str, Any]
) -> None:
    assert planned()[TRAIN].tokens_per_s.value == 10
    assert planned(train=changed)[TRAIN].tokens_per_s.value is None
