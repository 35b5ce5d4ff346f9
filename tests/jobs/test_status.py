"""A run that is watched while it is at work: tiny stages in the background, on a terminal and off one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from capgap.jobs.cli import main
from capgap.pipeline.stage.folder import WORK_FOLDER, begin, content_files, finish
from capgap.pipeline.stage.heartbeat import heartbeat
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.workflow.state import states
from capgap.schemas.errors import MachineError
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

CAPGAP = Path(sys.executable).with_name("capgap")
TIMEOUT_S = 1800
SHAPE = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}


@pytest.fixture
def at_work(made: Any, tmp_path: Path) -> Iterator[Path]:
    """The run file of a run whose teacher trains until it is stopped, with a checkpoint behind it."""
    folder, _ = made
    shutil.copytree(folder / "out", tmp_path / "out")
    settings = yaml.safe_load((folder / "run.yaml").read_text()) | {"out": str(tmp_path / "out")}
    settings["teacher"]["training"] = {"num_epochs": 100_000, "log_every_steps": 1, "checkpoint_every_steps": 5}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [CAPGAP, "run", run_file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield run_file
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_training_is_watched_in_every_form_until_it_is_killed(at_work: Path) -> None:
    """As JSON, as lines that an interrupt ends, and as a table on a terminal: all at once, to start the run once."""
    _when(lambda: list((at_work.parent / "out" / "teacher" / "work").glob("checkpoints/*.ckpt")))
    as_json, as_lines = _watch(at_work, "--json"), _watch(at_work)
    parent, child = pty.openpty()
    on_a_terminal = subprocess.Popen(
        [CAPGAP, "status", at_work, "--watch", "--every", "0.2"],
        stdin=subprocess.DEVNULL,
        stdout=child,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "170", "LINES": "40"},
    )
    os.close(child)

    looks = (json.loads(line) for line in as_json.stdout)
    pid = _json_shows_a_training(looks)
    _lines_come_where_something_changed(as_lines)
    shown = b""
    while len(set(_steps(shown))) < 2:
        shown += os.read(parent, 4096)

    os.kill(pid, signal.SIGKILL)
    last = list(looks)[-1]
    (gone,) = next(stage for stage in last["stages"] if stage["instance"] == "teacher")["ended"]
    assert gone["pid"] == pid and gone["ended"] is None
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while part := os.read(parent, 4096):
            shown += part
    os.close(parent)
    for watch in (as_json, on_a_terminal):
        assert watch.wait(timeout=TIMEOUT_S) == 3
        assert watch.stderr.read().startswith("capgap: teacher: its process ended without a message")
    _table_changed_in_place(shown)


def _json_shows_a_training(looks: Iterator[dict[str, Any]]) -> int:
    first = next(looks)
    assert first["run"] == "small" and re.fullmatch(r"[\d-]+T[\d:.]+Z", first["time"])
    stages = {stage["instance"]: stage for stage in first["stages"]}
    assert stages["corpus"]["state"] == "current" and stages["corpus"]["at_work"] == []
    assert stages["cache"]["state"] == "missing"
    teacher = stages["teacher"]
    assert teacher["state"] == "partial" and teacher["train_loss"] > 0 and teacher["tokens_per_s"] > 0
    (beat,) = teacher["at_work"]
    assert (beat["device"], beat["machine"], beat["ended"]) == ("cpu", os.uname().nodename, None)
    assert 0 < beat["count"]["done"] < beat["count"]["total"] and beat["count"]["unit"] == "steps"
    (lease,) = first["leases"]
    assert (lease["device"], lease["holder"], lease["pid"]) == ("cpu", "teacher of run small", beat["pid"])
    later = next(look for look in looks if _count(look) > beat["count"]["done"])
    assert later["time"] > first["time"]
    pid: int = beat["pid"]
    return pid


def _lines_come_where_something_changed(watch: subprocess.Popen[str]) -> None:
    lines = [watch.stdout.readline() for _ in range(10)]
    assert "corpus: current\n" in lines and "cache: missing, never made\n" in lines
    of_the_teacher = [line for line in lines if line.startswith("teacher")]
    assert len(of_the_teacher) >= 3, "and nothing is said again of the stages at which nothing happens"
    for line in of_the_teacher:
        assert re.fullmatch(
            r"teacher: at work, [\d,]+ of [\d,]+ steps \(train\), loss [\d.]+, [\d,]+ tokens/s, "
            r"\d+ (s|min|h \d\d min) left, loss [\d.]+, on cpu of .+\n",
            line,
        )
    watch.send_signal(signal.SIGINT)
    watch.stdout.read()
    assert watch.wait(timeout=TIMEOUT_S) == 130
    assert watch.stderr.read() == ""


def _table_changed_in_place(shown: bytes) -> None:
    # the cursor goes up to where the table stands, and its lines are wiped
    assert shown.count(b"\x1b[1A") > 5 and b"\x1b[2K" in shown
    plain = _plain(shown)
    assert re.search(r"stage +state +how far, or why +tokens/s +left +loss +device +seen", plain)
    assert re.search(r"cpu of this machine: teacher of run small, pid \d+, since \S+Z", plain)
    assert plain.rindex("its process was killed") > plain.rindex("at work"), "what stays is how it ended"


@pytest.fixture
def run(tmp_path: Path) -> RunFile:
    """A run of which nothing is made, and its file `run.yaml`."""
    model = {"model": SHAPE}
    settings = {"name": "watched", "out": str(tmp_path / "out"), "device": "cpu", "corpus": {}, "teacher": model}
    settings |= {"cache": {}, "student": model, "train": {}, "eval": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return RunFile.model_validate(settings)


def test_a_run_that_is_current_ends_the_watch_at_once(
    run: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in states(run):
        state = states(run)[name]
        state.folder.mkdir(parents=True)
        begin(state.folder, state.order)
        (state.folder / "result.txt").write_text("result")
        files = content_files(state.folder)
        parts = {"content": content_of(files), "files": files, "versions": {}, "wall_s": 0.0, "command": ()}
        finish(state.folder, Manifest(**state.order.model_dump(), **parts, started="2026-01-01T00:00:00+00:00"))
    assert main(["status", str(tmp_path / "run.yaml"), "--watch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name}: current" for name in states(run)]
    assert main(["status", str(tmp_path / "run.yaml"), "--json"]) == 0
    once = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in once["stages"]} == {"current"}


def test_a_stage_that_fails_under_the_watch_s_eyes_ends_it_with_its_word_and_code(
    run: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = states(run)["corpus"]
    state.folder.mkdir(parents=True)
    begin(state.folder, state.order)

    shown = io.StringIO()

    def stage() -> None:
        with contextlib.suppress(MachineError), heartbeat(state.folder / WORK_FOLDER):
            _when(lambda: "corpus: at work" in shown.getvalue())
            raise MachineError("no space is left", where="/runs", fix="free some")

    thread = threading.Thread(target=stage)
    thread.start()
    with contextlib.redirect_stdout(shown):
        assert main(["status", str(tmp_path / "run.yaml"), "--watch", "--every", "0.1"]) == 3
    thread.join()
    assert capsys.readouterr().err == "capgap: corpus: /runs: no space is left; free some\n"
    assert shown.getvalue().splitlines()[-1] == "corpus: failed, begun; /runs: no space is left; free some"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--every", "5"], "--every: is for --watch; found 5, expected --watch beside it; give both, or neither"),
        (["--watch", "--every", "0"], "--every: not an interval; found 0.0, expected at least 0.1 seconds"),
    ],
)
def test_an_interval_that_means_nothing_is_refused(
    run: RunFile, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path / "run.yaml"), *flags]) == 2
    assert capsys.readouterr().err == f"capgap: {said}\n"


def _watch(run_file: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [CAPGAP, "status", run_file, "--watch", "--every", "0.2", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _count(look: dict[str, Any]) -> int:
    (teacher,) = [stage for stage in look["stages"] if stage["instance"] == "teacher"]
    return teacher["at_work"][0]["count"]["done"] if teacher["at_work"] else 0


def _plain(shown: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))


def _steps(shown: bytes) -> list[str]:
    return re.findall(r"teacher +at work +([\d,]+) of", _plain(shown))


def _when(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)
    return found
