"""A run with rounds: its graph, its states, and what one round hands to the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from round_runs import run_of, start_in

from capgap.pipeline.stage.context import FINAL, Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.stages import stage_named
from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import downstream, instances, roles, select
from capgap.pipeline.workflow.state import State, states
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_file import RunFile

MakeRounds = Callable[..., RunFile]
ARMS: dict[str, Any] = {"own": {}, "sft": {"alpha": 0.0}}
BARE: dict[str, Any] = {
    "name": "rounds",
    "out": "runs/rounds",
    "seeds": [0, 1],
    "corpus": {},
    "teacher": {"path": "teacher"},
    "rounds": {"prompts": "prompts.jsonl", "num": 2},
    "cache": {},
    "student": {"path": "student"},
    "train": {},
}


def names(run: RunFile, *stages: str) -> list[str]:
    return [one.name for one in instances(run) if one.stage in stages]


def test_a_text_of_the_teachers_is_for_all_and_those_of_students_are_their_own() -> None:
    run = RunFile.model_validate(BARE | {"arms": ARMS})
    assert names(run, "generate") == [
        "generate/round-0",
        *(f"generate/{arm}/seed-{seed}/round-1" for seed in (0, 1) for arm in ARMS),
    ]
    assert [name.replace("cache", "generate") for name in names(run, "cache")] == names(run, "generate")
    baseline = run_of(BARE | {"arms": ARMS}, off_policy_arms=["sft"])
    assert set(names(baseline, "generate")) == {
        "generate/round-0",
        "generate/round-1",
        "generate/own/seed-0/round-1",
        "generate/own/seed-1/round-1",
    }
    first = run_of(BARE | {"arms": ARMS}, first_writer="student", num=1)
    assert names(first, "generate") == ["generate/seed-0/round-0", "generate/seed-1/round-0"]


def test_a_round_reads_its_own_cache_the_weights_before_and_what_it_replays() -> None:
    run = run_of(BARE, num=3, replay=0.5)
    last = Instance("train", "distilled", 1, 2)
    assert roles(run, last) == {
        "cache/round-0": "caches/round-0",
        "cache/distilled/seed-1/round-1": "caches/round-1",
        "cache/distilled/seed-1/round-2": "cache",
        "train/distilled/seed-1/round-1": "student/seed-1",
        # by which logprobs its student wrote; of the teacher's text nobody asks that
        "generate/distilled/seed-1/round-1": "texts/round-1",
        "generate/distilled/seed-1/round-2": "text",
    }
    written = Instance("generate", "distilled", 1, 2)
    assert roles(run, written)["train/distilled/seed-1/round-1"] == "writer"


def test_the_final_students_are_measured_under_their_usual_names_and_write_once_more() -> None:
    run = RunFile.model_validate(BARE | {"eval": {}, "tune": {"sources": ["chats.jsonl"]}})
    assert roles(run, Instance("eval"))["train/distilled/seed-0/round-1"] == "train/distilled/seed-0"
    assert roles(run, Instance("eval"))["cache/round-0"] == "cache"
    assert roles(run, Instance("tune", "distilled", 1)) == {"train/distilled/seed-1/round-1": "train/distilled/seed-1"}
    final = Instance("generate", "distilled", 0, FINAL)
    assert final.name == "generate/distilled/seed-0/final" in names(run, "generate")
    assert "cache/distilled/seed-0/final" not in names(run, "cache")
    for num in (2, 3):
        # after a further round it is another student's, and made again without being asked for
        more = run_of(BARE | {"eval": {}}, num=num)
        assert roles(more, final)[f"train/distilled/seed-0/round-{num - 1}"] == "writer"
        assert not stage_named("generate").is_costly(more, final)


def test_rounds_are_named_like_any_other_instance() -> None:
    run = RunFile.model_validate(BARE)
    assert [one.name for one in select(run, "cache/round-0")] == ["cache/round-0"]
    later = {one.name for one in downstream(run, "train/distilled/seed-0/round-0")}
    assert later == {
        "train/distilled/seed-0/round-0",
        "generate/distilled/seed-0/round-1",
        "cache/distilled/seed-0/round-1",
        "train/distilled/seed-0/round-1",
    }


@pytest.mark.parametrize(
    ("settings", "rounds", "message"),
    [
        ({"teacher": None}, {}, "rounds: found without teacher"),
        ({"train": None}, {}, "rounds: found without train"),
        ({"cache": {"num_heldout_sequences": 0}}, {}, "num_heldout_sequences: found 0 with rounds"),
        ({"reuse": {"cache": "c"}}, {}, "reuse.cache: found with rounds"),
        ({}, {"off_policy_arms": ["none"]}, "off_policy_arms: found 'none'"),
        ({}, {"answer_pattern": "("}, "answer_pattern"),
        ({}, {"answer_pattern": "a"}, "found 0 groups"),
        ({"train": {"caches": {"round-0": {"path": "c"}}}}, {}, "found the name 'round-0' with rounds"),
        ({"teacher": {"served": "big"}, "cache": {"engine": "server", "recording": "topk"}}, {}, "first_writer"),
    ],
)
def test_what_rounds_need_is_asked_for(settings: dict[str, Any], rounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_of(BARE | settings, **rounds)


def test_two_rounds_end_current_and_each_goes_on_from_the_one_before(make_rounds: MakeRounds) -> None:
    run = make_rounds(replay=0.5)
    made = walk(run, instances(run), log=lambda name, why: None, start=start_in(run))
    assert made == [
        "generate/round-0",
        "cache/round-0",
        "train/distilled/seed-1/round-0",
        "generate/distilled/seed-1/round-1",
        "cache/distilled/seed-1/round-1",
        "train/distilled/seed-1/round-1",
    ]
    assert {one.state for one in states(run).values()} == {State.CURRENT}
    out = Path(run.out)
    caches = [read_manifest(out / name) for name in made if name.startswith("cache")]
    # nats between writer and teacher on the writer's own text: the teacher itself is as far as engines round
    own, of_student = (cache.totals["writer_kl"] for cache in caches if cache is not None)
    assert abs(own) < 1e-3 < of_student
    last = read_manifest(out / made[-1])
    assert last is not None
    assert last.inputs["student/seed-1"].path == str(out / "train/distilled/seed-1/round-0")
    assert last.inputs["caches/round-0"].path == str(out / "cache/round-0")
    # longer rounds and one more: what decides is told, and what was made stays
    more = with_rounds(run, num=3)
    assert {one.state for name, one in states(more).items() if "round-2" not in name} == {State.CURRENT}
    other = with_rounds(run, max_new_tokens=11)
    assert states(other)["generate/round-0"].why == "rounds.max_new_tokens was 10, is 11"
    with pytest.raises(MismatchError, match="finished stages would be replaced"):
        walk(other, instances(other), log=lambda name, why: None, start=start_in(other))
    # the teacher of a later round is that of the first, or nothing goes on
    another = RunFile.model_validate(run.model_dump() | {"teacher": {"path": run.teacher.path, "seed": 5}})
    assert states(another)["cache/distilled/seed-1/round-1"].replaced
    with pytest.raises(MismatchError, match="finished stages would be replaced"):
        walk(another, select(another, "cache"), log=lambda name, why: None, start=start_in(another))


def with_rounds(run: RunFile, **rounds: Any) -> RunFile:
    """The run in the same folder, with other settings of its rounds."""
    values = run.model_dump()
    return RunFile.model_validate(values | {"rounds": values["rounds"] | rounds})
