from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from capgap.pipeline.workflow.lease import device_identity, leases
from capgap.schemas.errors import MachineError

_HOLDER = """
import logging, sys, time
from capgap.pipeline.workflow.lease import leases
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
print("started", flush=True)
with leases(["cpu"], holder=sys.argv[1], wait=True):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("CAPGAP_LEASE_DIR", str(tmp_path / "leases"))
    started: list[subprocess.Popen[str]] = []

    def begin(holder: str, seconds: float = 120) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", _HOLDER, holder, str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert _line(started[-1]) == "started"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def _line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip()


def test_a_second_stage_that_does_not_wait_is_told_who_holds_the_device(start: Start) -> None:
    holder = start("teacher of run demo")
    assert _line(holder) == "held"
    message = (
        rf"cpu: the device is in use; found teacher of run demo \(pid {holder.pid}\); wait for it to end, or leave"
    )
    with pytest.raises(MachineError, match=message), leases(["cpu"], holder="cache of run demo", wait=False):
        pytest.fail("two stages on one device")


def test_a_second_stage_waits_and_has_the_device_once_the_holder_is_killed(start: Start) -> None:
    holder = start("teacher of run demo")
    assert _line(holder) == "held"
    second = start("cache of run demo")
    assert _line(second) == f"waiting for cpu, held by teacher of run demo (pid {holder.pid})"
    time.sleep(0.3)
    assert second.poll() is None
    os.kill(holder.pid, signal.SIGKILL)
    assert _line(second) == "held"
    assert holder.wait() == -signal.SIGKILL
    with (
        pytest.raises(MachineError, match=rf"found cache of run demo \(pid {second.pid}\)"),
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


def test_the_cpu_is_one_device() -> None:
    assert device_identity("cpu") == "cpu"


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
