"""How long a stage took in all, where several processes were at it."""

from __future__ import annotations

from pathlib import Path

from capgap.pipeline.stage.context import Instance, Slice
from capgap.pipeline.stage.folder import WORK_FOLDER, begin
from capgap.pipeline.stage.heartbeat import heartbeat
from capgap.pipeline.stage.seconds import add_seconds, earlier_s, take_over
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.slices import carry_out_slice
from capgap.pipeline.workflow.state import states
from capgap.schemas.heartbeat import Heartbeat

CORPUS = Instance("corpus")


def _killed(work: Path, seconds: float, name: str = "progress.json") -> None:
    """What a process of another machine leaves that was killed, or stopped, after so long."""
    work.mkdir(parents=True, exist_ok=True)
    beat = Heartbeat(
        machine="elsewhere", namespace="1", pid=17, pid_started=1, phase="works", begun_s=1000.0, advanced_s=1000.0,
        written_s=1000.0 + seconds, ended={"what": "interrupted", "exit_code": 130},
    )  # fmt: skip
    (work / name).write_text(beat.model_dump_json())


def test_seconds_of_each_process_are_counted_once(tmp_path: Path) -> None:
    assert earlier_s(tmp_path) == 0
    for seconds in (5.0, 7.0):
        _killed(tmp_path, seconds)
        take_over(tmp_path)
        take_over(tmp_path)
    add_seconds(tmp_path, 2.5)
    assert earlier_s(tmp_path) == 14.5
    with heartbeat(tmp_path):
        # this process has a clock of its own
        assert earlier_s(tmp_path) == 14.5
    _killed(tmp_path, -3.0)
    (tmp_path / "seconds.json").write_text("[")
    assert earlier_s(tmp_path) == 0


def test_a_stage_that_was_killed_and_resumed_took_as_long_as_all_its_processes(make_corpus_run) -> None:
    run = make_corpus_run()
    state = states(run)["corpus"]
    state.folder.mkdir(parents=True)
    begin(state.folder, state.order)
    _killed(state.folder / WORK_FOLDER, 5000.0)
    begin(state.folder, state.order)
    _killed(state.folder / WORK_FOLDER, 3000.0)
    made = carry_out(run, CORPUS)
    assert 8000 < made.wall_s < 9000 + carry_out(run, CORPUS, remake=True).wall_s
    assert carry_out(run, CORPUS, remake=True).wall_s < 8000


def test_slices_that_left_the_rest_to_others_are_counted_too(make_corpus_run) -> None:
    run = make_corpus_run()
    first = carry_out_slice(run, CORPUS, Slice(1, 2))
    work = states(run)["corpus"].folder / WORK_FOLDER
    before = earlier_s(work)
    assert first is None and before > 0
    _killed(work, 5000.0, "progress-elsewhere-17.json")
    made = carry_out_slice(run, CORPUS, Slice(None))
    assert made is not None and made.wall_s > 5000 + before
