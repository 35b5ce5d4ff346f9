"""A run that is watched while it is at work: tiny stages in the background, on a terminal and off one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

CAPGAP = Path(sys.executable).with_name("capgap")
TIMEOUT_S = 300


@pytest.fixture
def at_work(run_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`capgap run` of a teacher that trains until it is stopped, with a logged step behind it."""
    settings = yaml.safe_load(run_file.read_text())
    settings["teacher"]["training"] = {"num_epochs": 100_000, "log_every_steps": 1, "checkpoint_every_steps": 5}
    run_file.write_text(yaml.safe_dump(settings))
    process = subprocess.Popen(
        [CAPGAP, "run", run_file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    _when(lambda: list((run_file.parent / "out" / "teacher" / "work").glob("checkpoints/*.ckpt")))
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_watch_shows_a_training_until_it_is_killed_and_then_says_so(run_file: Path, at_work: Any) -> None:
    watch = _watch(run_file, "--json")
    looks = (json.loads(line) for line in watch.stdout)
    first = next(looks)
    assert first["run"] == "small" and re.fullmatch(r"[\d-]+T[\d:.]+Z", first["time"])
    stages = {stage["instance"]: stage for stage in first["stages"]}
    assert stages["corpus"]["state"] == "current" and stages["corpus"]["at_work"] == []
    assert stages["cache"]["state"] == "missing"
    teacher = stages["teacher"]
    assert teacher["state"] == "partial" and teacher["train_loss"] > 0 and teacher["tokens_per_s"] > 0
    (sign,) = teacher["at_work"]
    assert (sign["device"], sign["machine"], sign["ended"]) == ("cpu", os.uname().nodename, None)
    assert 0 < sign["count"]["done"] < sign["count"]["total"] and sign["count"]["unit"] == "steps"
    (lease,) = first["leases"]
    assert (lease["device"], lease["holder"], lease["pid"]) == ("cpu", "teacher of run small", sign["pid"])
    later = next(look for look in looks if _count(look) > sign["count"]["done"])
    assert later["time"] > first["time"]
    os.kill(sign["pid"], signal.SIGKILL)
    last = list(looks)[-1]
    (gone,) = next(stage for stage in last["stages"] if stage["instance"] == "teacher")["ended"]
    assert gone["pid"] == sign["pid"] and gone["ended"] is None
    assert watch.wait(timeout=TIMEOUT_S) == 3
    assert watch.stderr.read().startswith("capgap: teacher: its process is gone without a word")
    once = subprocess.run([CAPGAP, "status", run_file], capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in once.splitlines() if line.startswith("teacher ")]
    assert re.search(r"partial +\d+ of \d+ steps; its process was killed", line)


def test_off_a_terminal_a_line_comes_where_something_changed_and_ctrl_c_ends_the_watch(
    run_file: Path, at_work: Any
) -> None:
    watch = _watch(run_file)
    lines = [watch.stdout.readline() for _ in range(8)]
    assert "corpus: current\n" in lines and "cache: missing, never made\n" in lines
    assert all(not line.startswith("\x1b") for line in lines)
    found = [
        re.fullmatch(
            r"teacher: at work, [\d,]+ of [\d,]+ steps \(train\), loss [\d.]+, [\d,]+ tokens/s, "
            r"\d+ (s|min|h \d\d min) left, loss [\d.]+, on cpu of .+\n",
            line,
        )
        for line in (*lines, watch.stdout.readline(), watch.stdout.readline())
        if line.startswith("teacher")
    ]
    assert len(found) >= 2 and all(found), "and nothing is said of the stages at which nothing happens"
    watch.send_signal(signal.SIGINT)
    watch.stdout.read()
    assert watch.wait(timeout=TIMEOUT_S) == 130
    assert watch.stderr.read() == ""


def test_a_terminal_has_one_table_that_changes_in_place_until_the_stage_is_interrupted(
    run_file: Path, at_work: Any
) -> None:
    parent, child = pty.openpty()
    watch = subprocess.Popen(
        [CAPGAP, "status", run_file, "--watch", "--every", "0.2"],
        stdin=subprocess.DEVNULL,
        stdout=child,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"},
    )
    os.close(child)
    shown = b""
    while len(set(_steps(shown))) < 2:
        shown += os.read(parent, 4096)
    os.killpg(at_work.pid, signal.SIGINT)
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while part := os.read(parent, 4096):
            shown += part
    os.close(parent)
    assert watch.wait(timeout=TIMEOUT_S) == 130
    assert watch.stderr.read() == "capgap: teacher: interrupted\n"
    # the cursor goes up to where the table stands, and its lines are wiped
    assert shown.count(b"\x1b[1A") > 5 and b"\x1b[2K" in shown
    plain = _plain(shown)
    assert re.search(r"stage +state +how far, or why +tokens/s +left +loss +device +seen", plain)
    assert re.search(r"cpu of this machine: teacher of run small, pid \d+, since \S+Z", plain)
    assert plain.rindex("interrupted") > plain.rindex("at work"), "what stays is how it ended"


def test_a_run_that_is_current_ends_the_watch_at_once(made: Any, run_file: Path) -> None:
    settings = yaml.safe_load(run_file.read_text())
    assert subprocess.run([CAPGAP, "student", run_file], capture_output=True, check=False).returncode == 0
    out = run_file.parent / "out"
    watched = yaml.safe_dump(settings | {"reuse": {"corpus": str(out / "corpus")}})
    run_file.write_text(watched)
    watch = _watch(run_file, "--json")
    first = json.loads(watch.stdout.readline())
    states = {stage["instance"]: stage["state"] for stage in first["stages"]}
    assert states["student/seed-0"] == "current" and states["corpus"] == "reused" and states["train/distilled/seed-0"]
    watch.kill()
    watch.wait()


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
