"""What the models of a run cost, by hand, and which of them no other beats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.pages.charts import Chart
from capgap.pipeline.plan.published_models import MODELS, SHOTS
from capgap.pipeline.report.frontier import RunFrontier, run_frontier
from capgap.pipeline.report.frontier_charts import frontier_charts, published_chart
from capgap.pipeline.report.gather import gather
from capgap.pipeline.stage.context import StageContext, StageInput
from capgap.schemas.results import RESULTS_NAME, EvalResults
from capgap.schemas.run_file import RunFile

LOSSES = {"cross_entropy": [3.53, 3.57], "distilled": [3.50, 3.52], "wasteful": [3.56, 3.56]}
# of the finished folders that the fixture makes
STUDENT, TEACHER, TRAINED, CACHED, TAUGHT = 1_240_000, 7_610_000, 2_000_000, 4096 * 256, 8_000_000

Make = Callable[..., StageContext]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, make_context: Make) -> StageContext:
    return make_context(tmp_path_factory.mktemp("run"), LOSSES)


def frontier(context: StageContext) -> RunFrontier:
    return run_frontier(
        context, EvalResults.model_validate_json((context.input("eval").path / RESULTS_NAME).read_bytes())
    )


def chart(context: StageContext, name: str) -> Chart:
    found = frontier(context)
    charts = (*frontier_charts(found, tuple(LOSSES)), published_chart(found, tuple(LOSSES)))
    return next(one for one in charts if one.name == name)


def with_totals(context: StageContext, name: str, totals: dict[str, Any], **more: Any) -> StageContext:
    made = context.inputs[name]
    manifest = made.manifest.model_copy(update={"totals": totals, **more})
    return dataclasses.replace(context, inputs=context.inputs | {name: StageInput(made.location, manifest)})


def measured(context: StageContext, name: str, value: float, limit: int | None = None, **shots: int) -> StageContext:
    """The run with a benchmark of one model, as the stage leaves it."""
    folder = Path(context.input("eval").path).parent / "benchmarks" / f"{name}-{limit}-{len(shots)}".replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"asked": task, "value": value, "main": True, "num_fewshot": shots.get(task, number)}
        for task, number in SHOTS.items()
    ]
    rows.append({"asked": "mmlu", "value": 0.0, "main": False, "num_fewshot": 5})
    (folder / "benchmark.json").write_text(json.dumps({"limit": limit, "rows": rows}))
    manifest = context.input("eval").manifest.model_copy(update={"instance": name})
    return dataclasses.replace(context, inputs=context.inputs | {name: StageInput(folder, manifest)})


def all_measured(context: StageContext, limit: int | None = None) -> StageContext:
    values = {"cross_entropy": 0.25, "distilled": 0.35, "wasteful": 0.2}
    for arm, value in values.items():
        for seed in (0, 1):
            context = measured(context, f"benchmark/{arm}/seed-{seed}", value + 0.02 * seed, limit)
    return context


def test_costs_are_those_of_the_paper_s_accounting(context: StageContext) -> None:
    teacher, alone, distilled, _ = frontier(context).models
    assert (teacher.flops, teacher.flops_with_teacher) == (6 * TEACHER * TAUGHT,) * 2
    assert (alone.flops, alone.flops_with_teacher) == (6 * STUDENT * TRAINED,) * 2
    assert distilled.flops == 6 * STUDENT * TRAINED + 2 * TEACHER * CACHED
    assert distilled.flops_with_teacher == distilled.flops + 6 * TEACHER * TAUGHT
    assert (alone.loss, distilled.loss) == pytest.approx((3.55, 3.51))


def test_what_another_beats_is_not_on_the_line(context: StageContext) -> None:
    assert frontier(context).by_loss == ("cross_entropy", "distilled", "teacher")
    own = chart(context, "frontier")
    assert [row[0] for row in own.rows if row[-1] == "no"] == ["wasteful"]
    assert "wasteful 3.5600 at 3.08e+13" in str(own.svg)


def test_a_student_made_from_its_teacher_pays_for_the_teacher_s_training(context: StageContext) -> None:
    made_from = {"teacher": {"path": "t", "identity": "i", "content": "c"}}
    for seed in (0, 1):
        context = with_totals(context, f"student/seed-{seed}", {}, inputs=made_from)
    _, alone, *_ = frontier(context).models
    assert alone.flops_with_teacher == 6 * STUDENT * TRAINED + 6 * TEACHER * TAUGHT


def test_a_given_teacher_has_no_cost_and_is_not_drawn(context: StageContext) -> None:
    given = with_totals(context, "teacher", {"num_parameters": TEACHER})
    teacher, alone, distilled, _ = frontier(given).models
    assert teacher.flops is None and "a given model" in teacher.unknown
    assert distilled.flops is not None and distilled.flops_with_teacher is None
    assert alone.flops_with_teacher == alone.flops
    own = chart(given, "frontier")
    assert "Not drawn: teacher: a given model" in own.caption
    assert own.rows[0][-1] == "-"


def test_an_adapted_teacher_has_no_cost_for_its_adaptation_is_the_least_of_it(context: StageContext) -> None:
    settings = {"teacher": {"path": "given", "adapt": {"max_tokens": 1024}}}
    adapted = with_totals(context, "teacher", {"num_tokens": 1024}, settings=settings)
    teacher, alone, distilled, _ = frontier(adapted).models
    assert (teacher.tokens, teacher.flops) == (None, None) and "is not known" in teacher.unknown
    assert distilled.flops is not None and distilled.flops_with_teacher is None
    assert distilled.unknown == "on how many tokens its teacher was trained is not known"
    assert alone.flops_with_teacher == alone.flops


def test_an_arm_that_takes_no_step_has_no_pass_of_the_teacher_and_is_not_called_distilled(
    tmp_path: Path, make_context: Make
) -> None:
    losses = {"cross_entropy": [3.53, 3.57], "untrained": [4.5, 4.5]}
    arms = {"cross_entropy": {"alpha": 0}, "untrained": {"max_tokens": 0}}
    context = make_context(tmp_path / "run", losses, arms=arms)
    _, _, untrained = frontier(with_totals(context, "train/untrained/seed-0", {"num_tokens": 0})).models
    assert (untrained.flops, untrained.flops_with_teacher) == (0, 0)
    assert gather(context).gains == ()


def test_a_teacher_that_is_asked_itself_passes_over_what_the_student_reads(tmp_path: Path, make_context: Make) -> None:
    context = make_context(tmp_path / "run", {"online": [3.5]}, train={"targets": "online"})
    _, online = frontier(context).models
    assert online.flops == 6 * STUDENT * TRAINED + 2 * TEACHER * TRAINED


def with_rounds(context: StageContext) -> StageContext:
    """The run with one round, whose text the teacher wrote: 1000 tokens of answers in a cache of 1500."""
    rounds = {"prompts": ["prompts.jsonl"], "num": 1, "first_writer": "teacher"}
    run = RunFile.model_validate(context.run.model_dump(exclude_unset=True) | {"rounds": rounds})
    context = dataclasses.replace(context, run=run)
    for name, totals in {"generate": {"answer_tokens": 1000}, "cache": {"num_tokens": 1500}}.items():
        instance = f"{name}/round-0"
        manifest = context.input("cache").manifest.model_copy(update={"instance": instance, "totals": totals})
        made = StageInput(context.input("cache").path, manifest)
        context = dataclasses.replace(context, inputs=context.inputs | {instance: made})
    return context


def test_text_that_the_teacher_wrote_costs_an_arm_without_its_targets_too(tmp_path: Path, make_context: Make) -> None:
    losses = {"cross_entropy": [3.5], "distilled": [3.4]}
    _, alone, distilled = frontier(with_rounds(make_context(tmp_path / "run", losses))).models
    assert alone.flops == 6 * STUDENT * TRAINED + 2 * TEACHER * 1000
    assert alone.flops_with_teacher == alone.flops + 6 * TEACHER * TAUGHT
    assert distilled.flops == 6 * STUDENT * TRAINED + 2 * TEACHER * (1000 + 1500)


def test_a_student_of_further_caches_has_no_cost_that_could_be_said(tmp_path: Path, make_context: Make) -> None:
    context = make_context(tmp_path / "run", {"mixed": [3.5]}, train={"caches": {"other": {"path": "there"}}})
    _, mixed = frontier(context).models
    assert mixed.flops is None and "further caches" in mixed.unknown


def test_without_benchmarks_the_published_models_stand_alone(context: StageContext) -> None:
    published = chart(context, "published")
    assert len(published.rows) == len(MODELS)
    assert "This run's models are not drawn" in published.caption
    assert frontier(context).by_score == ()


def test_models_measured_on_the_same_six_stand_beside_the_published_ones(context: StageContext) -> None:
    run = all_measured(context)
    published = chart(run, "published")
    own = {row[0]: row[1:] for row in published.rows[len(MODELS) :]}
    assert own["distilled (this run)"][1:8] == ("36.00",) * 6 + ("36.0",)
    assert frontier(run).by_score == ("cross_entropy", "distilled")
    assert "cross_entropy" in str(published.svg) and "This run's models were measured" in published.caption


def test_a_trial_other_examples_and_a_missing_seed_are_not_held_against_the_paper(context: StageContext) -> None:
    assert not any(model.scores for model in frontier(all_measured(context, limit=10)).models)
    other = measured(all_measured(context), "benchmark/distilled/seed-1", 0.4, mmlu=0)
    assert [model.name for model in frontier(other).models if model.scores] == ["cross_entropy", "wasteful"]
    one_seed = measured(context, "benchmark/distilled/seed-0", 0.4)
    assert not any(model.scores for model in frontier(one_seed).models)
