from __future__ import annotations

import pytest

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stages import declared
from capgap.pipeline.workflow.graph import decisive_settings, downstream, input_names, instances, select
from capgap.schemas.errors import SettingError

ALL = [
    "corpus",
    "teacher",
    "cache",
    "student/seed-0",
    "student/seed-1",
    "train/distilled/seed-0",
    "train/cross_entropy/seed-0",
    "train/distilled/seed-1",
    "train/cross_entropy/seed-1",
    "eval",
    "report",
]


def _names(found: list[Instance]) -> list[str]:
    return [instance.name for instance in found]


def test_a_student_per_seed_and_a_training_per_arm_and_seed(make_run) -> None:
    assert _names(instances(make_run())) == ALL


def test_inputs_stand_before_what_reads_them(make_run) -> None:
    run = make_run()
    seen: set[str] = set()
    for instance in instances(run):
        assert set(input_names(run, instance)) <= seen
        seen.add(instance.name)


def test_a_training_reads_the_student_of_its_own_seed_alone(make_run) -> None:
    found = input_names(make_run(), Instance("train", arm="distilled", seed=1))
    assert found == ["corpus", "cache", "student/seed-1"]


def test_a_training_reads_the_teacher_only_where_it_asks_it(make_run) -> None:
    run = make_run({"train.targets": "online", "arms.cached": {"targets": "cache"}})
    found = {arm: input_names(run, Instance("train", arm=arm, seed=1)) for arm in run.arms}
    assert found["distilled"] == ["corpus", "teacher", "cache", "student/seed-1"]
    # cross-entropy asks nobody, and a cached training the cache alone
    assert found["cross_entropy"] == found["cached"] == ["corpus", "cache", "student/seed-1"]


def test_every_result_reaches_the_report(make_run) -> None:
    assert set(input_names(make_run(), Instance("report"))) == set(ALL) - {"report"}


def test_a_reused_stage_has_no_instance_and_stays_an_input(make_run) -> None:
    run = make_run({"reuse": {"corpus": "there/corpus", "teacher": "there/teacher"}})
    assert _names(instances(run)) == ALL[2:]
    assert input_names(run, Instance("cache")) == ["corpus", "teacher"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("corpus", ["corpus"]),
        ("train", [name for name in ALL if name.startswith("train/")]),
        ("train/distilled", ["train/distilled/seed-0", "train/distilled/seed-1"]),
        ("train/cross_entropy/seed-1", ["train/cross_entropy/seed-1"]),
        ("student/seed-1", ["student/seed-1"]),
    ],
)
def test_a_pattern_names_a_stage_an_arm_or_one_instance(make_run, pattern: str, expected: list[str]) -> None:
    assert _names(select(make_run(), pattern)) == expected


def test_several_patterns_name_all_that_each_does_in_the_run_s_order(make_run) -> None:
    found = _names(select(make_run(), "student", "corpus", "student/seed-1"))
    assert found == ["corpus", "student/seed-0", "student/seed-1"]


@pytest.mark.parametrize("pattern", ["tain", "train/distil", "train/distilled/seed-2", "train/", "", "seed-0"])
def test_a_pattern_that_names_nothing_is_refused_with_the_stages(make_run, pattern: str) -> None:
    with pytest.raises(
        SettingError, match=r"no such stage in this run; found .*expected one of corpus, teacher, cache, student, tr"
    ):
        select(make_run(), pattern)


def test_a_reused_stage_cannot_be_chosen_and_the_message_says_why(make_run) -> None:
    with pytest.raises(SettingError, match=r"found corpus \(corpus is reused from there\), expected one of teacher"):
        select(make_run({"reuse": {"corpus": "there"}}), "corpus")


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        ("corpus", set()),
        ("teacher", {"corpus", "student/seed-0", "student/seed-1"}),
        ("cache", {"corpus", "teacher", "student/seed-0", "student/seed-1"}),
        ("student/seed-1", {*ALL[:4], "train/distilled/seed-0", "train/cross_entropy/seed-0"}),
        ("train/distilled", {*ALL[:5], "train/cross_entropy/seed-0", "train/cross_entropy/seed-1"}),
        ("report", set(ALL) - {"report"}),
    ],
)
def test_downstream_is_what_depends_on_it_in_order(make_run, pattern: str, missing: set[str]) -> None:
    assert _names(downstream(make_run(), pattern)) == [name for name in ALL if name not in missing]


def test_every_stage_of_the_graph_has_decisive_settings(make_run) -> None:
    tuned = {"judge.model": "one", "tune": {"sources": ["chat.jsonl"]}}
    run = make_run({"benchmarks.tasks": {"mmlu": {}}, "rounds.prompts": ["prompts.jsonl"], **tuned})
    # a run has rounds or another tokenizer, not both
    aligned = make_run({"align": {"tokenizer": "other"}})
    assert {i.stage for i in (*instances(run), *instances(aligned))} == {stage.name for stage in declared()}
    assert all(decisive_settings(one, instance) for one in (run, aligned) for instance in instances(one))


def test_benchmarks_are_a_stage_of_each_model_between_eval_and_report(make_run) -> None:
    run = make_run({"benchmarks.tasks": {"mmlu": {}}})
    measured = _names(select(run, "benchmark"))
    assert measured == ["benchmark/teacher", *(name.replace("train", "benchmark", 1) for name in ALL[5:9])]
    assert _names(instances(run)) == [*ALL[:-1], *measured, "report"]
    read = {i.name: input_names(run, i) for i in select(run, "benchmark")}
    assert read["benchmark/teacher"] == ["teacher"]
    assert read["benchmark/cross_entropy/seed-1"] == ["train/cross_entropy/seed-1"]
    assert input_names(run, Instance("report"))[-5:] == measured
    with pytest.raises(SettingError, match="found benchmark, expected one of corpus"):
        select(make_run(), "benchmark")


def test_an_arm_may_not_take_the_teacher_s_place_among_benchmarks(make_run) -> None:
    tasks = {"benchmarks.tasks": {"mmlu": {}}}
    with pytest.raises(ValueError, match="arms: found 'teacher', expected another name"):
        make_run(tasks | {"arms": {"teacher": {}}})
    make_run(tasks | {"arms": {"teacher": {}}, "benchmarks.teacher": False})


def test_each_final_model_answers_and_the_judge_reads_all_answers(make_run) -> None:
    run = make_run({"judge.model": "one", "seeds": [0]})
    judging = {i.name: input_names(run, i) for i in instances(run) if i.stage in ("answers", "judge")}
    assert judging == {
        "answers/teacher": ["teacher"],
        "answers/distilled/seed-0": ["train/distilled/seed-0"],
        "answers/cross_entropy/seed-0": ["train/cross_entropy/seed-0"],
        "judge": ["answers/teacher", "answers/distilled/seed-0", "answers/cross_entropy/seed-0"],
    }
    assert "judge" in input_names(run, Instance("report"))
