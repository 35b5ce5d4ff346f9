"""What has cost device time is replaced only where somebody names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import instances
from capgap.pipeline.workflow.remake import (
    EVERY_STAGE,
    LastCommand,
    require_nothing_lost,
    require_stages,
    write_command,
)
from capgap.pipeline.workflow.state import RunStates, State, states
from capgap.schemas.errors import MismatchError, SettingError
from capgap.schemas.run_file import RunFile

MakeRun = Callable[..., RunFile]


@pytest.fixture
def finished_run(make_run: MakeRun, make_finished) -> RunFile:
    run = make_run()
    for name in states(run):
        make_finished(run, name)
    return run


def _refused(run: RunFile, *named: str) -> str:
    known = RunStates(run)
    with pytest.raises(MismatchError) as caught:
        require_nothing_lost(known, instances(run), frozenset(named))
    return str(caught.value)


def _allowed(run: RunFile, named: frozenset[str] = frozenset()) -> None:
    require_nothing_lost(RunStates(run), instances(run), named)


def test_a_finished_run_can_be_walked_again(finished_run: RunFile) -> None:
    _allowed(finished_run)


def test_a_forgotten_flag_is_refused_with_the_setting_and_the_flags_of_the_run_before(finished_run, make_run) -> None:
    flags = ("--cache.num_samples", "12")
    write_command(Path(finished_run.out), LastCommand(flags=flags))
    said = _refused(make_run({"cache.num_samples": 64}))
    assert "cache (cache.num_samples was 50, is 64)" in said
    assert "give the flags of the run before (--cache.num_samples 12)" in said
    assert "--remake cache --remake train" in said and "2 more" in said


def test_a_cause_far_up_is_told_rather_than_the_input_that_it_changed(finished_run, make_run) -> None:
    said = _refused(make_run({"corpus.seq_len": 64}))
    assert "teacher (corpus: corpus.seq_len was 256, is 64)" in said


def test_what_is_named_may_be_replaced_and_what_follows_from_it_must_be_named_too(finished_run, make_run) -> None:
    changed = make_run({"cache.num_samples": 64})
    assert "--remake train" in _refused(changed, "cache") and "--remake cache" not in _refused(changed, "cache")
    _allowed(changed, frozenset({"cache", "train"}))
    _allowed(changed, EVERY_STAGE)


def test_one_training_can_be_named_alone(finished_run, make_run) -> None:
    changed = make_run({"arms.distilled": {"alpha": 0.9}})
    assert "train/distilled/seed-0" in _refused(changed) and "train/cross_entropy" not in _refused(changed)
    _allowed(changed, frozenset({"train/distilled/seed-0", "train/distilled/seed-1"}))


@pytest.mark.parametrize("settings", [{"eval.num_sequences": 7}, {"name": "other"}, {"arms.more": {}}, {"seeds": [0]}])
def test_what_costs_little_or_is_new_is_made_without_being_named(finished_run, make_run, settings: dict[str, Any]):
    _allowed(make_run(settings))


def test_lost_files_are_made_again_without_being_named(finished_run: RunFile) -> None:
    (Path(finished_run.out) / "cache" / "result.txt").unlink()
    assert states(finished_run)["train/distilled/seed-0"].state is State.STALE
    _allowed(finished_run)


def test_a_walk_refuses_before_it_makes_anything(finished_run, make_run) -> None:
    started: list[Any] = []
    run = make_run({"corpus.seq_len": 64})
    with pytest.raises(MismatchError, match="finished stages would be replaced"):
        walk(run, instances(run), log=lambda name, why: None, start=lambda arguments: started.append(arguments) or 0)
    assert started == [] and (Path(run.out) / "corpus" / "manifest.json").is_file()


def test_a_walk_makes_again_what_is_named_and_tells_the_stage_so(finished_run, make_run, make_finished) -> None:
    run, started = make_run({"arms.distilled": {"alpha": 0.9}}), []

    def start(arguments) -> int:
        started.append((arguments[arguments.index("--instance") + 1], "--force" in arguments))
        make_finished(run, started[-1][0])
        return 0

    made = walk(run, instances(run), log=lambda name, why: None, remake=["train/distilled"], start=start)
    again = ["train/distilled/seed-0", "train/distilled/seed-1"]
    assert made == [*again, "eval", "report"]
    assert [name for name, forced in started if forced] == [*again, "eval", "report"]


def test_the_page_on_reruns_shows_the_refusal_word_for_word(make_run, make_finished, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"out": "runs/mine", "arms": {"distilled": {}}, "seeds": [0]}
    run = make_run({**given, "train.learning_rate": 1e-4})
    for name in states(run):
        make_finished(run, name)
    write_command(Path(run.out), LastCommand(flags=("--train.learning_rate", "1e-4")))
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "rerun.md").read_text()
    assert f"\n```\ncapgap: {_refused(make_run(given))}\n```\n" in page


def test_a_name_that_is_no_stage_is_refused() -> None:
    require_stages(["cache", "train/distilled/seed-0"])
    with pytest.raises(SettingError, match="--remake: no such stage; found cahce, expected one of corpus, teacher"):
        require_stages(["cahce"])
