"""What a stage says of itself on disk while it works, and what others may conclude from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.heartbeat import (
    begin_phase,
    current_heartbeat,
    heartbeat,
    is_alive,
    read_heartbeats,
    require_nobody_elsewhere,
)
from capgap.pipeline.stage.progress import progress
from capgap.schemas.errors import MachineError

_STAGE = """
import sys, time
from pathlib import Path
from capgap.pipeline.stage.progress import progress
from capgap.pipeline.stage.heartbeat import heartbeat
with heartbeat(Path(sys.argv[1]) / "work"), progress("cache", 40, "sequences", 10, lines=False) as meter:
    meter.advance(5, tokens=640, note="halfway")
    print("counted", flush=True)
    time.sleep(600)
"""


def _until(condition, seconds: float = 1800):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)
    return found


@pytest.fixture
def stage(tmp_path: Path):
    """A process that is at work on a folder, and has counted 15 of 40."""
    process = subprocess.Popen([sys.executable, "-c", _STAGE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "counted\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_sees_how_far_it_is_and_that_it_is_alive(stage, tmp_path: Path) -> None:
    (beat,) = _until(lambda: [s for s in read_heartbeats(tmp_path / "work") if s.count and s.count.done == 15])
    assert (beat.pid, beat.machine) == (stage.pid, os.uname().nodename)
    assert (beat.count.title, beat.count.total, beat.count.unit) == ("cache", 40, "sequences")
    assert beat.count.note == "halfway" and beat.count.tokens_per_s > 0 and beat.count.eta_s > 0
    assert beat.ended is None and is_alive(beat)


def test_a_killed_process_leaves_its_heartbeat_and_is_not_alive(stage, tmp_path: Path) -> None:
    (beat,) = read_heartbeats(tmp_path / "work")
    stage.send_signal(signal.SIGKILL)
    # not yet waited for, so that its process id still exists
    _until(lambda: not is_alive(beat))
    assert stage.poll() is None or stage.returncode == -signal.SIGKILL
    stage.wait()
    (left,) = read_heartbeats(tmp_path / "work")
    assert left.ended is None and not is_alive(left)


def test_another_process_of_the_same_number_is_not_it(tmp_path: Path) -> None:
    with heartbeat(tmp_path / "work"):
        (beat,) = read_heartbeats(tmp_path / "work")
    assert is_alive(beat)
    if beat.pid_started is None:
        pytest.skip("this system does not say when a process began")
    assert not is_alive(beat.model_copy(update={"pid_started": beat.pid_started - 1}))


def test_a_process_of_another_machine_is_believed_for_two_minutes(tmp_path: Path) -> None:
    with heartbeat(tmp_path / "work"):
        (beat,) = read_heartbeats(tmp_path / "work")
    elsewhere = beat.model_copy(update={"machine": "elsewhere", "pid": 1 << 22})
    assert is_alive(elsewhere)
    assert not is_alive(elsewhere.model_copy(update={"written_s": elsewhere.written_s - 121}))
    # by a clock that was far ahead when it died, it would live for years
    assert not is_alive(elsewhere.model_copy(update={"written_s": elsewhere.written_s + 1e8}))
    # of another container, where process ids are others
    assert is_alive(beat.model_copy(update={"namespace": "pid:[1]", "pid": 1 << 22}))


def test_a_clock_that_is_turned_back_does_not_stop_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("capgap.pipeline.stage.heartbeat._WRITE_EVERY_S", 0.02)
    monkeypatch.setattr("capgap.pipeline.stage.heartbeat._BEAT_EVERY_S", 0.1)
    path = tmp_path / "work" / "progress.json"
    with heartbeat(tmp_path / "work"):
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 1e6)
        written = path.stat().st_ino
        _until(lambda: path.stat().st_ino != written)
        assert read_heartbeats(tmp_path / "work")[0].written_s < now


def test_nobody_else_is_at_work_where_no_heartbeat_of_elsewhere_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("capgap.pipeline.stage.heartbeat._WRITE_EVERY_S", 0.02)
    monkeypatch.setattr("capgap.pipeline.stage.heartbeat._WATCHED_S", 600)
    work = tmp_path / "work"
    with heartbeat(work):
        (own,) = read_heartbeats(work)
    # its own, which was killed, is not even watched
    (work / "progress.json").write_text(own.model_dump_json())
    began = time.monotonic()
    require_nobody_elsewhere(work)
    assert time.monotonic() - began < 600
    monkeypatch.setattr("capgap.pipeline.stage.heartbeat._WATCHED_S", 0.5)
    began = time.monotonic()
    other = own.model_copy(update={"machine": "elsewhere"})
    (work / "progress.json").write_text(other.model_dump_json())
    require_nobody_elsewhere(work)
    assert time.monotonic() - began > 0.5
    monkeypatch.setattr("capgap.pipeline.stage.heartbeat._WATCHED_S", 600)
    stopped = threading.Event()

    def beat() -> None:
        number = 0
        while not stopped.wait(0.02):
            number += 1
            moved = other.model_copy(update={"written_s": other.written_s - 3600 + number})
            (work / "next").write_text(moved.model_dump_json())
            (work / "next").replace(work / "progress.json")

    beats = threading.Thread(target=beat)
    beats.start()
    try:
        with pytest.raises(MachineError, match=rf"another machine is at work .* found pid {os.getpid()} of elsewhere"):
            require_nobody_elsewhere(work)
    finally:
        stopped.set()
        beats.join()


def test_it_is_written_at_most_once_a_second_however_often_it_advances(tmp_path: Path) -> None:
    path = tmp_path / "work" / "progress.json"
    with heartbeat(tmp_path / "work"), progress("cache", 10**6, "sequences", lines=False) as meter:
        seen, began = {path.stat().st_ino}, time.monotonic()
        while len(seen) < 3 and (took_s := time.monotonic() - began) < 600:
            for _ in range(1000):
                meter.advance(tokens=1)
            seen.add(path.stat().st_ino)
    # at 0, 1 and 2 seconds or later; each replaces the file, and what stands under a name is always whole
    assert len(seen) == 3 and took_s > 1


def test_why_a_stage_gave_up_is_its_last_word(tmp_path: Path) -> None:
    error = MachineError("no space", where="/runs", fix="free some")
    with pytest.raises(MachineError), heartbeat(tmp_path / "work"):
        raise error
    (beat,) = read_heartbeats(tmp_path / "work")
    assert (beat.ended.what, beat.ended.exit_code) == ("/runs: no space; free some", 3)
    assert not is_alive(beat)
    with pytest.raises(KeyboardInterrupt), heartbeat(tmp_path / "work"):
        raise KeyboardInterrupt
    (beat,) = read_heartbeats(tmp_path / "work")
    assert (beat.ended.what, beat.ended.exit_code) == ("interrupted", 130)
    with pytest.raises(ValueError), heartbeat(tmp_path / "work"):
        raise ValueError("two\nlines")
    (beat,) = read_heartbeats(tmp_path / "work")
    assert (beat.ended.what, beat.ended.exit_code) == ("ValueError: two lines", 1)


def test_processes_that_share_a_folder_have_a_file_each_and_leave_none(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with heartbeat(work, shared=True):
        assert [path.name for path in work.iterdir()] == [f"progress-{os.uname().nodename}-{os.getpid()}.json"]
    assert list(work.iterdir()) == []


def test_a_folder_that_another_process_has_finished_is_not_made_again(tmp_path: Path) -> None:
    with heartbeat(tmp_path / "work", shared=True) as beat:
        beat.begin_phase("slice 0/2")
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_that_cannot_be_written_is_nobody_s_trouble(tmp_path: Path) -> None:
    with heartbeat(tmp_path / "work") as beat:
        (tmp_path / "work" / "progress.half").mkdir()
        beat.begin_phase("at work")
        time.sleep(1.5)
    assert json.loads((tmp_path / "work" / "progress.json").read_text())["phase"] == "reads its inputs"
    assert current_heartbeat() is None


def test_half_a_heartbeat_and_one_of_another_version_are_none(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"machine": "a')
    (tmp_path / "progress-b-1.json").write_text('{"machine": "b", "mood": "good"}')
    assert read_heartbeats(tmp_path) == read_heartbeats(tmp_path / "nowhere") == []


def test_what_is_waited_for_in_silence_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "capgap")
    with heartbeat(tmp_path / "work"):
        event("stage_started", "something is said")
        begin_phase("loads the teacher")
        said = _until(lambda: [record for record in caplog.records if record.event == "waiting"])
    assert "loads the teacher (" in said[0].getMessage()
    assert said[0].fields["waited_s"] >= 2
