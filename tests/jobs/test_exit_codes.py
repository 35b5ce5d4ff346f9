"""0 done, 1 a fault of ours, 2 the user's to mend, 3 the machine, 4 damaged data, 130 interrupted, 128 + n by signal n.

From the command itself, and through `capgap run` from a stage's process.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from capgap.jobs import cli
from capgap.jobs.faults import named
from capgap.pipeline.stage.lease import leases
from capgap.schemas.errors import CapgapError, CorruptError, InputError, MachineError

CAPGAP = Path(sys.executable).with_name("capgap")


def test_each_kind_of_error_has_its_code() -> None:
    codes = [kind("x").exit_code for kind in (CapgapError, InputError, MachineError, CorruptError)]
    assert codes == [2, 2, 3, 4]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "full", "/runs/a.tar"), "/runs/a.tar: no space is left"),
        (OSError(errno.EROFS, "read-only", "/runs"), "/runs: cannot be written"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space is left"),
        (ModuleNotFoundError("No module named 's3fs'", name="s3fs"), "s3fs: a package is not installed"),
        (ConnectionRefusedError(111, "Connection refused"), "the network fails"),
        (socket.gaierror(-3, "Temporary failure in name resolution"), "the network fails"),
        (TimeoutError("timed out"), "the network fails"),
        (MemoryError(), "memory has run out; found MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory has run out; found CUDA"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory has run out"),
    ],
)
def test_what_the_machine_lacks_is_told_in_its_words(error: Exception, says: str) -> None:
    fault = named(error)
    assert isinstance(fault, MachineError) and says in str(fault)


@pytest.mark.parametrize(
    "error", [ValueError("x"), ModuleNotFoundError("No module named 'capgap.gone'", name="capgap.gone"), OSError("x")]
)
def test_what_nobody_expected_is_no_error_of_the_user_s(error: Exception) -> None:
    assert named(error) is None


def test_an_unexpected_exception_is_exit_code_1_with_traceback_and_a_line_that_asks_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: object) -> int:
        raise ZeroDivisionError("never seen before")

    monkeypatch.setattr("capgap.jobs.status.status_command", broken)
    assert cli.main(["status"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("Traceback") and any("ZeroDivisionError: never seen before" in line for line in said)
    assert said[-1].startswith("capgap: ZeroDivisionError was not expected") and "please report" in said[-1]


def test_verify_ends_with_4_at_a_flipped_byte_and_so_does_a_run_that_reads_it(run_file: Path, capgap: Any) -> None:
    shard = next((run_file.parent / "out" / "corpus").glob("teacher-*.tar"))
    data = bytearray(shard.read_bytes())
    for position in range(100, len(data), 512):
        data[position] ^= 1
    shard.write_bytes(data)
    verified = capgap("verify", run_file.parent / "out")
    assert verified.returncode == 4 and str(shard) in verified.stderr
    run = capgap("run", run_file, "--only", "teacher")
    assert run.returncode == 4, run.stderr
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("capgap: ")]
    assert shard.name in line


def test_a_device_that_is_held_is_3_through_a_run_and_names_its_holder(run_file: Path, capgap: Any) -> None:
    with leases(["cpu"], "train of run other", wait=False):
        run = capgap("run", run_file, "--only", "student", "--no-wait", "--log-format", "json")
    assert run.returncode == 3, run.stderr
    last = json.loads(run.stderr.splitlines()[-1])
    assert (last["event"], last["stage"], last["fields"]["error"]) == ("failed", "student/seed-0", "MachineError")
    assert f"train of run other (pid {os.getpid()}, since " in last["fields"]["found"]


def test_a_setting_that_only_the_stage_refuses_is_2_through_a_run(run_file: Path, capgap: Any) -> None:
    settings = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(settings | {"student": {"path": str(run_file.parent / "nowhere")}}))
    run = capgap("run", run_file, "--only", "student")
    assert run.returncode == 2, run.stderr
    assert len([line for line in run.stderr.splitlines() if line.startswith("capgap: ")]) == 1


def test_a_stage_that_is_killed_is_137_and_one_that_is_interrupted_130(run_file: Path) -> None:
    for number, code in ((signal.SIGKILL, 137), (signal.SIGINT, 130)):
        process = _start(run_file, "--only", "teacher", "--force")
        (child,) = _when(lambda p=process: _children(p.pid))
        _when(lambda c=child: b"teacher" in Path(f"/proc/{c}/cmdline").read_bytes())
        # past the imports, in which an interrupt is Python's own
        _when((run_file.parent / "out" / "teacher" / "work.json").exists)
        os.kill(child, number)
        _, error = process.communicate(timeout=1800)
        assert process.returncode == code, error
        (run_file.parent / "out" / "teacher" / "work.json").unlink()
    assert "Traceback" not in error


def test_ctrl_c_on_a_run_is_130_and_says_that_the_same_command_goes_on(run_file: Path) -> None:
    process = _start(run_file, "--only", "teacher")
    _when((run_file.parent / "out" / "teacher" / "work.json").exists)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=1800)
    assert process.returncode == 130, error
    assert "capgap: interrupted; the same command goes on from here" in error and "Traceback" not in error


def test_a_reader_that_has_gone_is_no_crash(run_file: Path) -> None:
    process = subprocess.Popen([CAPGAP, "status", run_file], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert (process.wait(timeout=1800), error) == (141, "")


def _start(run_file: Path, *arguments: str) -> subprocess.Popen[str]:
    """`capgap run` in a process group of its own, as a terminal would give it; a training long enough to be caught."""
    settings = yaml.safe_load(run_file.read_text())
    settings["teacher"]["training"] = {"max_tokens": None, "num_epochs": 10_000}
    run_file.write_text(yaml.safe_dump(settings))
    return subprocess.Popen(
        [CAPGAP, "run", run_file, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _when(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 1800
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)
    return found


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_advice_on_a_folder_that_cannot_be_written_fits_commands_that_have_no_out(number: int) -> None:
    fault = named(OSError(number, "cannot", "/law"))
    assert fault is not None and fault.fix == "let the command write to another folder"
