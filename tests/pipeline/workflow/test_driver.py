"""A walk over the stages of a run, while others walk over the same folder."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from capgap.pipeline.stage.folder import WORK_FOLDER, begin
from capgap.pipeline.stage.heartbeat import heartbeat
from capgap.pipeline.workflow.driver import RESOLVED_NAME, StageFailedError, walk
from capgap.pipeline.workflow.graph import instances, select
from capgap.pipeline.workflow.remake import LastCommand, last_command
from capgap.pipeline.workflow.state import states
from capgap.schemas.run_file import RunFile

MakeRun = Callable[..., RunFile]
FLAGS = LastCommand(flags=("--train.learning_rate=0.01",))
OTHER = LastCommand(flags=("--train.learning_rate=0.5",))


def _silent(name: str, why: str) -> None:
    pass


def _read(arguments: Sequence[str]) -> tuple[str, RunFile]:
    """What a stage that is started so makes, and the settings that it reads."""
    path, name = (arguments[arguments.index(flag) + 1] for flag in ("--config", "--instance"))
    return name, RunFile.model_validate_json(Path(path).read_text())


def _names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if not path.is_dir()}


def test_stages_are_made_with_their_driver_s_settings_whoever_else_walks_there(make_run, make_finished) -> None:
    run, other = make_run({"train.learning_rate": 0.01}), make_run({"train.learning_rate": 0.5})
    read: list[float] = []

    def start(arguments: Sequence[str]) -> int:
        if "corpus" in read_names:
            # one that has nothing to do, and one whose stage is refused
            assert walk(other, select(other, "corpus"), log=_silent, command=OTHER) == []
            with pytest.raises(StageFailedError):
                walk(other, select(other, "teacher"), log=_silent, remake=["teacher"], start=lambda given: 3)
        name, found = _read(arguments)
        read_names.append(name)
        read.append(found.train.learning_rate)
        make_finished(run, name)
        return 0

    read_names: list[str] = []
    made = walk(run, instances(run), log=_silent, start=start, command=FLAGS)
    assert made == read_names == list(states(run)) and set(read) == {0.01}


@pytest.mark.parametrize("code", [0, 2])
def test_what_a_driver_s_stages_read_goes_with_it_however_it_ends(make_run, make_finished, code: int) -> None:
    run = make_run()

    def start(arguments: Sequence[str]) -> int:
        assert any(name.startswith(f"{RESOLVED_NAME}.own-") for name in _names(Path(run.out)))
        make_finished(run, _read(arguments)[0])
        return code

    if code:
        with pytest.raises(StageFailedError):
            walk(run, instances(run), log=_silent, start=start)
    else:
        walk(run, instances(run), log=_silent, start=start)
    assert _names(Path(run.out)) == {RESOLVED_NAME}


def test_what_a_killed_driver_left_is_not_read_and_goes_with_the_next_of_its_machine(make_run, make_finished) -> None:
    run = make_run()
    Path(run.out).mkdir()
    # another machine's lock may not be seen here, and its driver may be alive
    elsewhere = f"{RESOLVED_NAME}.own-another-{os.uname().nodename}-0123456789ab"
    for left in (f"{RESOLVED_NAME}.own-{os.uname().nodename}-0123456789ab", elsewhere):
        (Path(run.out) / left).write_text("half a fi")

    def start(arguments: Sequence[str]) -> int:
        make_finished(run, _read(arguments)[0])
        return 0

    walk(run, instances(run), log=_silent, start=start)
    assert _names(Path(run.out)) == {RESOLVED_NAME, elsewhere}
    assert RunFile.model_validate_json((Path(run.out) / RESOLVED_NAME).read_text()) == run


def test_a_driver_that_makes_nothing_leaves_the_settings_and_the_flags_that_are_written_down(make_run, make_finished):
    run, other = make_run({"train.learning_rate": 0.01}), make_run({"train.learning_rate": 0.5})

    def start(arguments: Sequence[str]) -> int:
        make_finished(run, _read(arguments)[0])
        return 0

    walk(run, instances(run), log=_silent, start=start, command=FLAGS)
    walk(other, select(other, "corpus"), log=_silent, command=OTHER)
    assert last_command(Path(run.out)) == FLAGS
    assert json.loads((Path(run.out) / RESOLVED_NAME).read_text())["train"]["learning_rate"] == 0.01
    # flags under which all of the run is current are as good as those before, and the later ones
    walk(run, instances(run), log=_silent, command=LastCommand())
    assert last_command(Path(run.out)) == LastCommand()


def test_a_driver_whose_stage_somebody_is_at_writes_nothing_down(make_run, make_finished) -> None:
    run, other = make_run(), make_run({"cache.num_samples": 7})
    for name in ("corpus", "teacher"):
        make_finished(run, name)
    state = states(run)["cache"]
    state.folder.mkdir(parents=True)
    begin(state.folder, state.order)
    with heartbeat(state.folder / WORK_FOLDER), pytest.raises(StageFailedError):
        walk(other, select(other, "cache"), log=_silent, start=lambda given: 3, command=OTHER)
    assert _names(Path(run.out)) == set()


def test_a_stage_s_manifest_has_the_command_that_was_typed_without_its_secrets(make_corpus_run, monkeypatch) -> None:
    run = make_corpus_run()
    monkeypatch.delenv("CAPGAP_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", ["capgap", "run", "my run.yaml", "--note=https://me:abc-123-def@somewhere/x"])
    assert walk(run, select(run, "corpus"), log=_silent) == ["corpus"]
    manifest = states(run)["corpus"].manifest
    assert manifest is not None
    assert manifest.command == ("capgap", "run", "my run.yaml", "--note=https://***@somewhere/x")
