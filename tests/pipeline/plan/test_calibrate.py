"""Rates that are probed: how much of the time is used, what is kept, and which plan believes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import NEEDED, settings_of

from capgap.jobs.cli import main
from capgap.pipeline.plan import Stated, make_plan
from capgap.pipeline.plan.probes import Probe, Rate, cache_rates, rate_within, student_rates, teacher_rates
from capgap.pipeline.plan.rates import CALIBRATION_NAME
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import InputError
from capgap.schemas.plan import Calibration, Figure, RunPlan
from capgap.schemas.run_file import RunFile

SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
RATES = {"cache": cache_rates, "student": student_rates, "teacher": teacher_rates}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return settings_of(tmp_path, "probed")


@pytest.fixture
def probe(settings: dict[str, Any], tmp_path: Path) -> Callable[..., dict[str, Rate]]:
    def rates(kind: str, more: dict[str, Any], **fields: Any) -> dict[str, Rate]:
        run = RunFile.model_validate(settings | more)
        scratch = tmp_path / f"scratch-{len(list(tmp_path.iterdir()))}"
        scratch.mkdir()
        # no time: the warm-up, and the least that can be measured
        return RATES[kind](Probe(run.model_dump_json(), "cpu", scratch, 300, 32, 0.0, **fields))

    return rates


def test_work_is_doubled_as_long_as_the_next_fits_into_the_time() -> None:
    now, done = 0.0, []

    def work(size: int) -> int:
        nonlocal now
        done.append(size)
        # the first is slow, as where kernels are compiled
        now += 50.0 if len(done) == 1 else size + 1.0
        return 100 * size

    assert rate_within([1, 2, 4, 8, 16], work, 19.0, lambda: now) == Rate(400, 5.0)
    # 2 + 3 + 5 s were taken, and 10 more would be too many
    assert done == [1, 1, 2, 4]


def test_what_exceeds_the_time_by_itself_is_measured_once_after_the_warm_up() -> None:
    now, done = 0.0, []

    def work(size: int) -> int:
        nonlocal now
        done.append(size)
        now += 100.0
        return 10

    assert rate_within([1, 2, 4], work, 1.0, lambda: now).tokens_per_s == 0.1
    assert done == [1, 1]


@pytest.mark.parametrize("recording", ["sampled", "topk", "both"])
def test_an_engine_and_a_student_are_probed_on_shards_of_the_run_s_own_recording(
    recording: str, probe: Callable[..., dict[str, Rate]]
) -> None:
    train = {"batch_sequences": 4, "recording": recording.replace("both", "topk")}
    cache = {"cache": {"engine": "transformers", "recording": recording}, "train": train}
    found = probe("student", cache)
    assert {name: rate.num_tokens for name, rate in found.items()} == {"train": 4 * 32, "student": 4 * 32}
    assert probe("cache", cache)["cache"].num_tokens == 32


def test_a_teacher_that_is_trained_here_is_probed_in_training_too(probe: Callable[..., dict[str, Rate]]) -> None:
    trained = {"model": SHAPE, "training": {"batch_sequences": 4, "micro_batch_sequences": 2}}
    assert {name: rate.num_tokens for name, rate in probe("teacher", {"teacher": trained}).items()} == {
        "teacher": 2 * 32,
        "forward": 2 * 32,
    }
    assert set(probe("teacher", {})) == {"forward"}


def test_a_finished_cache_is_what_its_student_is_probed_on(
    settings: dict[str, Any], probe: Callable[..., dict[str, Rate]]
) -> None:
    run = RunFile.model_validate(settings)
    for instance in NEEDED[:3]:
        carry_out(run, instance)
    found = probe("student", {"student": {"prune": {"num_layers": 1}}}, cache=f"{run.out}/cache")
    assert found["train"].tokens_per_s > 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"train": {"targets": "online"}}, "a teacher beside its student is not probed"),
        ({"student": {"path": "nowhere/at/all"}}, "no model can be found"),
        ({"student": {"model": SHAPE, "quantize": {"format": "int4"}}}, "a student of few bits is not probed"),
    ],
)
def test_what_cannot_be_probed_says_why(more: dict[str, Any], says: str, probe: Callable[..., dict[str, Rate]]) -> None:
    with pytest.raises(InputError, match=says):
        probe("student", more)


def test_a_plan_takes_probed_rates_where_nothing_better_is_known_and_the_settings_are_the_same(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run = RunFile.model_validate(settings)
    Path(run.out).mkdir()
    rates = {"cache": Figure(value=10.0, source="probed: here"), "train": Figure(value=None, source="could not: why")}
    kept = Calibration(device="d", made="m", resolved=run.model_dump(mode="json"), tokens_per_s=rates)
    (Path(run.out) / CALIBRATION_NAME).write_text(kept.model_dump_json())

    def rate(stage: str, stated: Stated = Stated(), **more: Any) -> Figure:  # noqa: B008  # frozen
        plan = make_plan(RunFile.model_validate(settings | more), stated)
        return next(one.tokens_per_s for one in plan.stages if one.instance.startswith(stage))

    assert rate("cache") == rates["cache"]
    assert rate("cache", Stated(teacher_tokens_per_s=7.0)).value == 7.0
    assert rate("cache", cache={"engine": "vllm"}).value is None, "another engine"
    elsewhere = {"out": str(tmp_path / "elsewhere")}
    assert rate("cache", **elsewhere).value is None
    assert rate("cache", Stated(like=(run.out,)), **elsewhere) == rates["cache"]
    missing = rate("train")
    assert missing.value is None and missing.source.startswith("could not: why; give --train-tokens-per-s")
    # what cannot be understood is as if it were not there
    (Path(run.out) / CALIBRATION_NAME).write_text("{")
    assert rate("cache").value is None


@pytest.mark.slow  # three processes that import torch
def test_a_plan_that_is_calibrated_knows_every_rate_and_so_does_the_next(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    trained = {"teacher": {"model": SHAPE, "training": {"max_tokens": 2048}}, "eval": {}}
    settings["corpus"]["teacher_fraction"] = 0.3
    file.write_text(json.dumps(settings | trained))
    assert main(["plan", str(file), "--calibrate", "--json"]) == 0
    plan = RunPlan.model_validate_json(capsys.readouterr().out)
    assert plan.device_hours.value is not None
    rates = {stage.instance: stage.tokens_per_s for stage in plan.stages}
    for name in ("teacher", "cache", "train/distilled/seed-1", "eval"):
        assert rates[name].value and rates[name].source.startswith("probed: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [CALIBRATION_NAME], "the scratch is gone"
    assert main(["plan", str(file), "--json"]) == 0
    assert RunPlan.model_validate_json(capsys.readouterr().out).stages == plan.stages
    # what is stated is not probed
    assert main(["plan", str(file), "--calibrate", "--teacher-tokens-per-s", "9"]) == 0
    said = capsys.readouterr()
    assert "probes the cache" not in said.err and "probes the student" in said.err
