"""What a grid will take: counted from the grid, at rates that are stated or computed, and held to its limits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.corpus import amounts
from capgap.pipeline.corpus.amounts import text_bytes
from capgap.pipeline.law.plan import plan_grid, require_limits
from capgap.pipeline.law.run import run_grid
from capgap.pipeline.plan import Stated
from capgap.schemas.errors import SettingError
from capgap.schemas.law_grid import LawGrid
from capgap.schemas.law_plan import LawPlan, PhasePlan
from capgap.schemas.plan import Figure

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
LARGE = {**SMALL, "hidden_size": 64}
# 512 x 32 of a tied embedding; 4 x 32 x 32, 3 x 32 x 64 and 3 x 32 of a layer and the last norm
NUM_SMALL = 512 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    chance = random.Random(3)
    text = " ".join("".join(chance.choices("abcdefgh", k=5)) for _ in range(20_000))
    (tmp_path / "text.txt").write_text(text)
    return {
        "name": "g",
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "seeds": [0, 1, 2],
        "corpus": {"sources": [str(tmp_path / "text.txt")], "vocab_size": 512, "seq_len": 64},
        "teachers": {"t": {"model": SMALL}, "u": {"model": LARGE}},
        "teacher_training": {"max_tokens": 8000},
        "cache": {"engine": "transformers"},
        "students": {"s": {"model": SMALL}},
        "budgets": {"short": {"tokens": 1000}, "long": {"tokens": 3000}},
        "alphas": [1.0, 0.5],
    }


def phase(plan: LawPlan, name: str) -> PhasePlan:
    (found,) = (one for one in plan.phases if one.phase == name)
    return found


def test_runs_tokens_and_operations_are_counted(values: dict[str, Any]) -> None:
    plan = plan_grid(LawGrid.model_validate(values), Stated(), num_workers=2)
    # of each seed: 2 budgets, alone and from 2 teachers at 2 alphas
    assert plan.num_rows == phase(plan, "students").num_left == 3 * 2 * (1 + 2 * 2)
    assert phase(plan, "measurements").num_left == 3 * (1 + 2)
    assert plan.num_processes == 1 + 2 * 2 + 3 * (1 + 2) * 2 + plan.num_rows
    assert phase(plan, "students").tokens.value == 3 * 5 * (1000 + 3000)
    assert phase(plan, "students").flops.value == 6 * NUM_SMALL * 3 * 5 * (1000 + 3000)
    assert phase(plan, "teachers").tokens.value == 2 * 8000
    assert (phase(plan, "caches").flops.value or 0) > 0


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        (
            {"budgets": {"none": {"tokens": 0}, "short": {"tokens": 500}}},
            "budgets.short, students.s: fewer tokens than",
        ),
        ({"budgets": {"few": {"tokens_per_parameter": 0.001}}}, "budgets.few, students.s: fewer tokens than"),
        ({"teacher_training": {"max_tokens": 500}}, "teachers.t.training.max_tokens: fewer tokens than"),
    ],
)
def test_a_budget_or_a_teacher_of_less_than_a_step_is_refused_before_the_corpus_is_made(
    values: dict[str, Any], changed: dict[str, Any], where: str
) -> None:
    grid = LawGrid.model_validate(values | changed)
    for begin in (lambda: plan_grid(grid, Stated(), num_workers=2), lambda: run_grid(grid, 1)):
        with pytest.raises(SettingError, match=f"{where} one step of training; .*expected at least 512"):
            begin()
    assert not Path(values["out"]).exists()


def test_the_text_of_a_corpus_that_is_not_made_is_looked_at_once(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []

    def noted(sources: tuple[str, ...], *more: Any) -> Figure:
        looked_at.append(sources)
        return text_bytes(sources, *more)

    monkeypatch.setattr(amounts, "text_bytes", noted)
    plan = plan_grid(LawGrid.model_validate(values), Stated(), num_workers=2)
    assert plan.num_rows > 1 and len(looked_at) == 1


def test_layers_scored_by_the_loss_without_them_take_a_pass_each(values: dict[str, Any]) -> None:
    teacher = {**LARGE, "num_layers": 3, "num_heads": 4}
    cuts = {"teachers": {"t": {"model": teacher}}, "inits": ["pruned"]}

    def scoring(**prune: Any) -> PhasePlan:
        grid = LawGrid.model_validate(values | cuts | {"prune": {"num_sequences": 10, **prune}})
        return phase(plan_grid(grid, Stated(), num_workers=1), "prunings")

    plain, by_loss, taylor = scoring(), scoring(layers="loss"), scoring(importance="taylor")
    assert plain.num_left == 3 and plain.tokens.value == taylor.tokens.value == 3 * 10 * 64
    # one pass for the scores, one with all layers, one without each
    assert by_loss.tokens.value == (1 + 1 + 3) * 3 * 10 * 64
    assert plain.flops.value is not None
    assert by_loss.flops.value == 5 * plain.flops.value and taylor.flops.value == 2 * plain.flops.value
    assert plain.device_hours.value is None and "--like RUN" in plain.device_hours.source


def test_hours_that_nothing_supports_are_left_out_and_it_is_said_what_to_give(values: dict[str, Any]) -> None:
    plan = plan_grid(LawGrid.model_validate(values), Stated(), num_workers=2)
    assert plan.hours.value is None and "--device-peak-tflops" in plan.hours.source
    assert any("--start-s" in note for note in plan.notes)
    unknown = require_limits(LawGrid.model_validate(values | {"max_hours": 1}), plan)
    assert len(unknown) == 1 and unknown[0].startswith("max_hours cannot be checked")


def test_hours_follow_from_a_peak_and_are_shared_by_the_workers(values: dict[str, Any]) -> None:
    grid, stated = LawGrid.model_validate(values), Stated(device_peak_tflops=0.001, mfu=0.5)
    one, two = (plan_grid(grid, stated, num_workers=number) for number in (1, 2))
    assert one.flops.value is not None and one.hours.value is not None
    assert one.hours.value == pytest.approx(one.flops.value / 0.5e9 / 3600)
    assert two.hours.value == pytest.approx(one.hours.value / 2)
    slow = plan_grid(grid, stated, num_workers=1, start_s=36)
    assert slow.hours.value == pytest.approx(one.hours.value + one.num_processes / 100)


@pytest.mark.parametrize("limit, sum_of", [("max_hours", "device hours: corpus"), ("max_disk_gb", "GB: corpus")])
def test_a_grid_beyond_a_limit_is_refused_with_its_sum(values: dict[str, Any], limit: str, sum_of: str) -> None:
    grid = LawGrid.model_validate(values | {limit: 1e-6})
    plan = plan_grid(grid, Stated(device_peak_tflops=0.001, mfu=0.5), num_workers=1)
    with pytest.raises(SettingError, match=f"{limit}: the plan of the grid exceeds the limit; found .*{sum_of}"):
        require_limits(grid, plan)
    assert require_limits(LawGrid.model_validate(values | {limit: 1e6}), plan) == ()
