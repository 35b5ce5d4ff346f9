"""What has cost device time is replaced only where somebody names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.jobs.cli import main
from capgap.pipeline.stage.folder import WORK_FOLDER, begin, plan_units
from capgap.pipeline.workflow.driver import walk
from capgap.pipeline.workflow.graph import instances, select
from capgap.pipeline.workflow.remake import (
    EVERY_STAGE,
    LastCommand,
    require_named,
    require_nothing_lost,
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


def _half_made(run: RunFile, name: str, num_units: int = 1) -> None:
    state = states(run)[name]
    state.folder.mkdir(parents=True, exist_ok=True)
    begin(state.folder, state.order)
    plan_units(state.folder / WORK_FOLDER, "units", 4, "unit-*")
    for number in range(num_units):
        (state.folder / WORK_FOLDER / f"unit-{number}").touch()


def test_the_advice_names_what_would_be_replaced_and_nothing_that_may_stay(finished_run, make_run) -> None:
    one_arm = _refused(make_run({"arms.distilled": {"alpha": 0.9}}))
    assert one_arm.endswith("replace them with --remake train/distilled")
    # of an arm of which one training is replaced, the other stays
    shutil.rmtree(Path(finished_run.out) / "train/distilled/seed-0")
    assert _refused(make_run({"arms.distilled": {"alpha": 0.9}})).endswith("replace them with --remake train/distilled")
    _half_made(make_run({"arms.distilled": {"alpha": 0.9}}), "train/distilled/seed-0")
    said = _refused(make_run({"arms.distilled": {"alpha": 0.9}}))
    assert said.endswith("replace them with --remake train/distilled/seed-1")


def test_the_advice_in_the_midst_of_a_walk_spares_what_stays_too(finished_run, make_run) -> None:
    known = RunStates(make_run({"arms.distilled": {"alpha": 0.9}}))
    chosen = instances(known.run)
    coming = [one for one in chosen if one.name == "train/distilled/seed-1"]
    with pytest.raises(MismatchError, match=r"--remake train/distilled$"):
        require_nothing_lost(known, chosen, frozenset(), coming)


def test_what_was_half_made_under_other_settings_is_refused_before_anything_is_made(make_run, make_finished) -> None:
    _half_made(make_run({"train.learning_rate": 0.01}), "train/distilled/seed-0")
    run, started = make_run({"train.learning_rate": 0.5}), []
    with pytest.raises(MismatchError) as caught:
        walk(run, instances(run), log=lambda name, why: None, start=lambda arguments: started.append(arguments) or 0)
    assert started == []
    said = "unfinished and was begun under other settings or from other sources; found train/distilled/seed-0 "
    assert said in str(caught.value)
    assert "train.learning_rate was 0.01, is 0.5" in str(caught.value)
    assert str(caught.value).endswith("--remake train")
    _allowed(run, frozenset({"train/distilled"}))


def test_what_was_begun_under_other_settings_and_got_nowhere_is_begun_anew(make_run) -> None:
    _half_made(make_run({"train.learning_rate": 0.01}), "train/distilled/seed-0", num_units=0)
    _allowed(make_run({"train.learning_rate": 0.5}))


def test_what_may_be_replaced_is_begun_anew_where_it_was_half_made(make_run, make_finished) -> None:
    """As in a grid, where the permission was asked for before."""
    _half_made(make_run({"corpus.seq_len": 64}), "corpus")
    run, forced = make_run(), []

    def start(arguments) -> int:
        forced.append("--force" in arguments)
        make_finished(run, "corpus")
        return 0

    walk(run, select(run, "corpus"), log=lambda name, why: None, replace=True, start=start)
    assert forced == [True]


@pytest.mark.parametrize(
    ("only", "name", "said"),
    [
        ("train", "cahce", "found cahce, expected one of train"),
        ("train", "train/distiled", "found train/distiled, expected one of train/distilled/seed-0"),
        ("cache", "train", "found train, expected one of cache"),
        ("cache", "", "found no name, expected one of cache"),
        ("cache", "*", "found [*], expected one of cache"),
        ("cache", "align", "found align, expected one of cache"),
    ],
)
def test_a_name_that_is_none_of_what_is_made_is_refused(make_run, only: str, name: str, said: str) -> None:
    run = make_run()
    with pytest.raises(SettingError, match=f"--remake: names nothing that this command makes; {said}"):
        walk(run, select(run, only), log=lambda name, why: None, remake=[name], start=lambda arguments: 0)
    assert not Path(run.out).exists()


def test_stages_arms_and_instances_are_names(make_run) -> None:
    run = make_run()
    require_named(["cache", "train", "train/distilled", "train/distilled/seed-0"], instances(run))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--remake", ""], "no name"),
        (["run", "--remake", " , "], "no name"),
        (["run", "--only", "train", "--remake", "cache"], "cache"),
        (["cache", "--remake", "train"], "train"),
        (["cache", "--remake", "train", "--slice", "0/2"], "train"),
        (["train", "--remake", "train/distiled"], "train/distiled"),
    ],
)
def test_a_command_refuses_to_make_again_what_it_does_not_make(make_run, tmp_path, capsys, words, said) -> None:
    (tmp_path / "run.json").write_text(make_run().model_dump_json())
    assert main([words[0], str(tmp_path / "run.json"), *words[1:]]) == 2
    assert f"--remake: names nothing that this command makes; found {said}, expected" in capsys.readouterr().err
