"""What is asked for: presets, lm-eval's own names, and refusals before any work. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

from capgap.pipeline.benchmark.measure import mean_of
from capgap.pipeline.benchmark.presets import PRESETS, asked_tasks
from capgap.pipeline.benchmark.tasks import check_tasks, task_manager
from capgap.pipeline.store.extras import adding
from capgap.schemas.benchmark import BenchmarkRow
from capgap.schemas.errors import InputError, MachineError, SettingError
from capgap.schemas.run_benchmark import BenchmarkSettings

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


def settings(**values: Any) -> BenchmarkSettings:
    return BenchmarkSettings.model_validate({"tasks": {"paper": {}}, **values})


@pytest.fixture(scope="module")
def index() -> dict[str, Any]:
    return task_manager(settings()).task_index


def test_the_paper_is_its_six_tasks_with_its_numbers_of_examples() -> None:
    asked = asked_tasks(settings().tasks)
    assert {one.task: one.num_fewshot for one in asked} == {
        "mmlu": 5,
        "ceval-valid": 5,
        "drop": 3,
        "humaneval": 0,
        "bbh_fewshot": 3,
        "gsm8k": 8,
    }


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_a_task_of_lm_eval_and_one_of_its_metrics(index, name: str) -> None:
    preset = PRESETS[name]
    found = index[preset.task].cfg
    metric, kind = preset.metric.split(",")
    listed = [one["metric"] for one in found.get("aggregate_metric_list") or found["metric_list"]]
    if name == "humaneval":
        # a function of the task's own, which names its results after k
        assert [(one.rpartition(".")[2], k["k"]) for one, k in zip(listed, found["metric_list"], strict=True)] == [
            ("pass_at_k", [1])
        ]
    else:
        assert metric in listed
    assert kind in [one["name"] for one in found.get("filter_list", [{"name": "none"}])]


def test_the_paper_is_refused_without_leave_to_run_programs_and_taken_with_it() -> None:
    with pytest.raises(SettingError, match=r"tasks\.humaneval: .*runs programs.*benchmarks\.allow_code_execution"):
        check_tasks(settings())
    assert len(check_tasks(settings(allow_code_execution=True))) == 6


def test_an_unknown_task_is_named_with_those_that_are_near() -> None:
    with pytest.raises(SettingError, match=r"no such task; found gsm8l; did you mean gsm8k") as refused:
        check_tasks(settings(tasks={"gsm8l": {}}))
    # gsm8k is a preset and a task of lm-eval
    assert str(refused.value).count("gsm8k or ") == 1


def test_examples_for_a_task_that_takes_none_are_refused() -> None:
    with pytest.raises(SettingError, match=r"humaneval\.num_fewshot: .*found 3, expected 0"):
        check_tasks(settings(tasks={"humaneval": {"num_fewshot": 3}}, allow_code_execution=True))


def test_a_task_twice_and_a_preset_with_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="a task is asked for twice; found mmlu"):
        asked_tasks(settings(tasks={"paper": {}, "mmlu": {}}).tasks)
    with pytest.raises(SettingError, match=re.escape("benchmarks.tasks.paper: a preset of several tasks has no sett")):
        asked_tasks(settings(tasks={"paper": {"num_fewshot": 1}}).tasks)


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"benchmarks\.include_path: there is no such folder"):
        check_tasks(settings(include_path=str(tmp_path / "nowhere")))


def test_a_machine_without_lm_eval_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = f"benchmarks: lm-eval is not installed; run `make venv` in a clone, or {adding('eval')}"
    with pytest.raises(MachineError, match=re.escape(said)):
        check_tasks(settings())


def _row(value: float, stderr: float | None) -> BenchmarkRow:
    values = dict.fromkeys(("chance", "higher_is_better", "num_fewshot"))
    values |= {"asked": "a", "task": "a", "metric": "acc", "filter": "none", "version": "1", "main": True}
    return BenchmarkRow.model_validate(
        {**values, "num_samples": 1, "num_all_samples": 1, "value": value, "stderr": stderr}
    )


def test_the_mean_counts_every_task_alike() -> None:
    mean = mean_of("paper", (_row(0.2, 0.03), _row(0.6, 0.04)))
    assert (mean.value, mean.stderr) == (pytest.approx(0.4), pytest.approx(0.025))
    assert mean_of("paper", (_row(0.2, 0.03), _row(0.6, None))).stderr is None
