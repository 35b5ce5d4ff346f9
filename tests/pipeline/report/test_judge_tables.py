from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from capgap.pipeline.report import stage
from capgap.pipeline.report.judge_tables import judge_line, judge_tables
from capgap.pipeline.stage.context import StageInput
from capgap.schemas.judge_results import JudgeIdentity, JudgeResults, Mean, ModelRatings, PairResult
from capgap.schemas.results import Interval


def mean(value: float) -> Mean:
    return Mean(value=value, interval=Interval(low=value - 0.5, high=value + 0.5))


@pytest.fixture
def judge() -> JudgeResults:
    teacher = ModelRatings(
        model="teacher",
        arm=None,
        seed=None,
        turn_1=mean(7),
        turn_2=mean(6),
        average=mean(6.5),
        by_category={"math": 3.25, "writing": 8.0},
        num_invalid=0,
        num_cut=2,
    )
    student = teacher.model_copy(
        update={
            "model": "train/distilled/seed-1",
            "turn_1": None,
            "average": None,
            "by_category": {"writing": 5.0},
            "num_invalid": 12,
        }
    )
    pair = PairResult(
        first="train/distilled/seed-1",
        second="teacher",
        num_wins=1,
        num_ties=5,
        num_losses=14,
        num_invalid=4,
        win_rate=Mean(value=0.175, interval=Interval(low=0.1, high=0.3)),
        consistency=0.75,
        num_first_place=5,
        num_second_place=0,
    )
    return JudgeResults(
        judge=JudgeIdentity(model="<b>judge</b>"),
        answered_by={},
        num_questions=12,
        num_bootstrap=1000,
        models=(teacher, student),
        pairs=(pair,),
        num_verdicts=96,
        num_invalid=16,
    )


def test_ratings_and_comparisons_are_tables_and_what_is_not_known_is_a_dash(judge: JudgeResults) -> None:
    ratings, categories, pairs = judge_tables(judge)
    assert ratings.rows == (
        ("teacher", "7.00 (6.50 to 7.50)", "6.00 (5.50 to 6.50)", "6.50 (6.00 to 7.00)", "0", "2"),
        ("distilled, seed 1", "-", "6.00 (5.50 to 6.50)", "-", "12", "2"),
    )
    assert categories.headings == ("model", "math", "writing")
    assert categories.rows == (("teacher", "3.25", "8.00"), ("distilled, seed 1", "-", "5.00"))
    assert pairs.rows == (("distilled, seed 1 on teacher", "1", "5", "14", "18 % (10 to 30)", "75 %", "4"),)
    assert "16 of 96 verdicts could not be read" in judge_line(judge)


def test_a_judge_of_one_kind_has_tables_of_that_kind(judge: JudgeResults) -> None:
    assert len(judge_tables(judge.model_copy(update={"pairs": ()}))) == 2
    assert len(judge_tables(judge.model_copy(update={"models": ()}))) == 1


def test_the_page_has_the_judge_s_tables_where_the_run_has_a_judge(
    tmp_path: Path, make_context, judge: JudgeResults
) -> None:
    context = make_context(tmp_path / "run", {"distilled": [3.5]})
    stage.run(context)
    without = (context.folder / "report.html").read_text()
    folder = tmp_path / "run" / "judge"
    folder.mkdir()
    (folder / "judge.json").write_text(judge.model_dump_json())
    made = StageInput(folder, context.input("eval").manifest.model_copy(update={"instance": "judge"}))
    stage.run(dataclasses.replace(context, inputs=context.inputs | {"judge": made}))
    page = (context.folder / "report.html").read_text()
    assert 'id="judge"' in page and 'id="judge"' not in without
    assert "&lt;b&gt;judge&lt;/b&gt; judged the answers to 12 questions" in page
    assert "distilled, seed 1 on teacher" in page
