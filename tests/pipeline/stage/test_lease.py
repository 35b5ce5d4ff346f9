from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capgap.pipeline.stage.lease import cpu_group, held_leases, leases, new_cpu_group
from capgap.schemas.errors import MachineError

_HOLDER = """
import logging, sys, time
from capgap.pipeline.stage.lease import leases
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
print("started", flush=True)
with leases(["cpu"], holder=sys.argv[1], wait=True):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

Start = Callable[..., subprocess.Popen[str]]

SINCE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"

# Says in one file, a line at a time, when it comes to the device and when it leaves it; a round in ten it dies there.
_ROUNDS = """
import os, random, signal, sys, time
from capgap.pipeline.stage.lease import leases
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
chance = random.Random(int(sys.argv[2]))
for number in range(6):
    with leases(["cpu"], holder=sys.argv[2], wait=True):
        os.write(log, b"come\\n")
        time.sleep(chance.uniform(0, 0.05))
        os.write(log, b"go\\n")
        if chance.random() < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path / "leases"))
    started: list[subprocess.Popen[str]] = []

    def begin(holder: str, seconds: float = 120) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLDER, holder, str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert _line(started[-1]) == "started"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_whoever_looks_sees_what_is_held_and_nobody_notices(start: Start) -> None:
    assert held_leases() == []
    holder = start("cache of run a")
    assert _line(holder) == "held"
    (held,) = held_leases()
    assert (held.device, held.holder, held.pid) == ("cpu", "cache of run a", holder.pid)
    assert re.fullmatch(SINCE, held.since)
    holder.kill()
    holder.wait()
    assert held_leases() == [], "the note is still there, and nobody is behind it"
    with leases(["cpu"], "train of run b", wait=False):
        pass


def _line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def test_a_second_stage_that_does_not_wait_is_told_who_holds_the_device(start: Start) -> None:
    holder = start("teacher of run demo")
    assert _line(holder) == "held"
    message = (
        rf"cpu: the device is in use; found teacher of run demo \(pid {holder.pid}, since {SINCE}\); wait for it to end"
    )
    with pytest.raises(MachineError, match=message), leases(["cpu"], holder="cache of run demo", wait=False):
        pytest.fail("two stages on one device")


def test_a_second_stage_waits_and_has_the_device_once_the_holder_is_killed(start: Start) -> None:
    holder = start("teacher of run demo")
    assert _line(holder) == "held"
    second = start("cache of run demo")
    waits = rf"waiting for cpu, held by teacher of run demo \(pid {holder.pid}, since {SINCE}\)"
    assert re.fullmatch(waits, _line(second))
    time.sleep(0.3)
    assert second.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    assert _line(second) == "held"
    assert holder.wait() == -signal.SIGKILL
    with (
        pytest.raises(MachineError, match=rf"found cache of run demo \(pid {second.pid}, since"),
        leases(["cpu"], holder="eval of run demo", wait=False),
    ):
        pytest.fail("two stages on one device")


def test_the_device_is_free_once_the_holder_ends(start: Start) -> None:
    holder = start("teacher of run demo", 0)
    assert _line(holder) == "held"
    assert holder.wait() == 0
    with leases(["cpu"], holder="cache of run demo", wait=False):
        pass


def test_the_device_is_free_after_a_stage_that_failed(start: Start) -> None:
    with pytest.raises(RuntimeError, match="boom"), leases(["cpu"], holder="teacher of run demo", wait=False):
        raise RuntimeError("boom")
    assert _line(start("cache of run demo")) == "held"


@pytest.mark.parametrize("note", [None, b"", b"{", b"\xff", b'{"holder": "x"}'])
def test_a_holder_without_a_readable_note_is_another_stage(start: Start, tmp_path: Path, note: bytes | None) -> None:
    assert _line(start("teacher of run demo")) == "held"
    path = tmp_path / "leases" / "cpu.json"
    path.unlink()
    if note is not None:
        path.write_bytes(note)
    with pytest.raises(MachineError, match="found another stage"), leases(["cpu"], holder="cache", wait=False):
        pytest.fail("two stages on one device")


def test_a_group_shares_a_device_that_nobody_else_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path / "leases"))
    with leases(["cpu"], "cache of run a", False, group="a"), leases(["cpu"], "cache of run a", False, group="a"):
        for group in ("b", ""):
            with (
                pytest.raises(MachineError, match="in use; found cache of run a"),
                leases(["cpu"], "x", False, group=group),
            ):
                pytest.fail("two stages on one device")
    with (
        leases(["cpu"], "train of run b", False),
        pytest.raises(MachineError, match="found train of run b"),
        leases(["cpu"], "cache of run a", False, group="a"),
    ):
        pytest.fail("two stages on one device")


def test_processes_that_a_grid_starts_share_the_cpu_and_no_other_grid_s_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path))
    assert cpu_group() == ""
    one, other = new_cpu_group("law g"), new_cpu_group("law g")
    with monkeypatch.context() as inside:
        for name, value in one.items():
            inside.setenv(name, value)
        of_one = cpu_group()
    assert of_one and of_one not in other.values()
    with leases(["cpu"], "train of run a", False, of_one), leases(["cpu"], "cache of run b", False, of_one):
        for group in (*other.values(), ""):
            with pytest.raises(MachineError, match="train of run a"), leases(["cpu"], "x", False, group):
                pass


def test_another_group_gets_the_device_once_the_last_of_the_first_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path / "leases"))
    first = leases(["cpu"], "cache of run a", False, group="a")
    second = leases(["cpu"], "cache of run a", False, group="a")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(MachineError), leases(["cpu"], "cache of run b", False, group="b"):
        pytest.fail("two stages on one device")
    second.__exit__(None, None, None)
    with leases(["cpu"], "cache of run b", False, group="b"):
        pass


def test_eight_processes_that_are_killed_at_random_are_never_on_one_device_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path / "leases"))
    log = tmp_path / "log"
    started = [subprocess.Popen([sys.executable, "-c", _ROUNDS, str(log), str(seed)]) for seed in range(8)]
    ended = [process.wait() for process in started]
    assert set(ended) == {0, -signal.SIGKILL}, "some are killed while they hold the device, and the others get it"
    marks = log.read_text().split()
    assert marks == ["come", "go"] * (len(marks) // 2)
    assert len(marks) >= 2 * 8


def test_the_note_says_stage_run_process_and_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path / "leases"))
    with leases(["cpu"], "a much longer name than that of the next holder", False):
        pass
    with leases(["cpu"], "cache of run a", False):
        note = json.loads((tmp_path / "leases" / "cpu.json").read_text())
    assert (note["holder"], note["pid"]) == ("cache of run a", os.getpid())
    assert re.fullmatch(SINCE, note["since"])


def test_another_user_waits_for_the_device_and_gets_it_whatever_the_umask_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("two other users are needed, which only root may become")
    # as in /tmp: everyone may write, nobody may remove what others wrote
    shared = Path(tempfile.mkdtemp(prefix="capgap-shared-", dir="/tmp"))
    shared.chmod(0o1777)
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(shared / "leases"))
    try:
        held, release = os.pipe(), os.pipe()

        def hold() -> None:
            with leases(["cpu"], "teacher of run demo", False):
                os.write(held[1], b"1")
                os.read(release[0], 1)

        def be_refused_then_wait() -> None:
            message = "found teacher of run demo"
            with pytest.raises(MachineError, match=message), leases(["cpu"], "cache of run demo", False):
                pytest.fail("two stages on one device")
            os.write(release[1], b"1")
            with leases(["cpu"], "cache of run demo", True):
                pass

        first = _as_user(1001, 0o077, hold)
        assert os.read(held[0], 1) == b"1"
        assert _ended(_as_user(1002, 0o077, be_refused_then_wait)) == 0
        assert _ended(first) == 0
        assert stat.S_IMODE((shared / "leases").stat().st_mode) == 0o1777
        assert {stat.S_IMODE(path.stat().st_mode) for path in (shared / "leases").iterdir()} == {0o666}
    finally:
        shutil.rmtree(shared)


def test_a_folder_of_leases_that_is_closed_to_this_user_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("another user is needed, whom only root may become")
    shared = Path(tempfile.mkdtemp(prefix="capgap-shared-", dir="/tmp"))
    shared.chmod(0o755)
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(shared))

    def be_refused() -> None:
        with (
            pytest.raises(MachineError, match=rf"{shared}/cpu.lock: the lease .* CAPGAP_LEASE_DIR"),
            leases(["cpu"], "x", False),
        ):
            pytest.fail("a lease without a file")

    try:
        assert _ended(_as_user(1001, 0o022, be_refused)) == 0
    finally:
        shutil.rmtree(shared)


def _as_user(user: int, umask: int, work: Callable[[], None]) -> int:
    """A process of that user which does the work; its exit code is 0 where nothing was raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setgid(user)
        os.setuid(user)
        os.umask(umask)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
