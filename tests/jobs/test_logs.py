"""What a command says: text, or one JSON object a line, on both streams."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from capgap.jobs.cli import main
from capgap.jobs.logs import log, log_crash, set_up_logs
from capgap.pipeline.stage.events import event, set_stage

NAMES = {"time", "level", "stage", "event", "message", "fields"}


def records(text: str) -> list[dict[str, Any]]:
    """Every line, which must be a record; a line of another form fails the test."""
    found = [json.loads(line) for line in text.splitlines()]
    for record in found:
        assert set(record) == NAMES
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    return found


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The format is in the environment, and handlers are the process's."""
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "text")
    monkeypatch.setenv("VLLM_CONFIGURE_LOGGING", "1")
    yield
    set_up_logs(["--log-format", "text"])
    logging.captureWarnings(False)


def test_a_stage_says_when_it_begins_how_far_it_is_and_what_it_made(made: Any) -> None:
    _, done = made
    said = records(done.stderr)
    assert done.stdout == ""
    assert {record["stage"] for record in said} == {"corpus"}
    names = [record["event"] for record in said]
    assert (names[0], names[-1]) == ("stage_started", "stage_done")
    progress = [record["fields"] for record in said if record["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] and progress[-1]["tokens_per_s"] > 0
    assert progress[-1]["eta_s"] == 0
    assert said[-1]["fields"]["totals"]["num_student_tokens"] > 0


def test_results_are_json_on_stdout(made: Any, capgap: Any) -> None:
    folder, _ = made
    status = capgap("status", folder / "run.yaml", "--log-format=json")
    states = {record["fields"]["instance"]: record["fields"]["state"] for record in records(status.stdout)}
    assert states["corpus"] == "current" and states["cache"] == "missing"
    verified = records(capgap("verify", folder / "out", "--log-format", "json").stdout)
    assert [record["event"] for record in verified] == ["verified"]


def test_the_environment_chooses_the_format_too_and_a_flag_wins(capgap: Any) -> None:
    json_by_variable = capgap("status", "nowhere.yaml", env={"CAPGAP_LOG_FORMAT": "json"})
    (record,) = records(json_by_variable.stderr)
    assert (record["event"], record["level"], record["fields"]["exit_code"]) == ("failed", "error", 2)
    assert record["fields"]["where"] == "nowhere.yaml" and record["fields"]["error"] == "InputError"
    text = capgap("status", "nowhere.yaml", "--log-format", "text", env={"CAPGAP_LOG_FORMAT": "json"})
    assert text.stderr.startswith("capgap: nowhere.yaml: no such run file")
    assert len(text.stderr.splitlines()) == 1


def test_an_unknown_format_is_refused_by_name(made: Any, capgap: Any) -> None:
    folder, _ = made
    refused = capgap("status", folder / "run.yaml", "--log-format", "xml")
    assert refused.returncode == 2 and "xml" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_events_warnings_and_other_packages_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs(["--log-format", "json"])
    set_stage("train/distilled/seed-0")
    event("shard", "100 % of 3\nlines", shard=2, eta_s=None, path=Path("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    logging.getLogger("other").error("%d of them", 3)
    shard, warned, other = records(capsys.readouterr().err)
    assert (shard["event"], shard["message"], shard["stage"]) == (
        "shard",
        "100 % of 3\nlines",
        "train/distilled/seed-0",
    )
    assert shard["fields"] == {"shard": 2, "path": "a"}
    assert warned["level"] == "warning" and "careful" in warned["message"]
    assert (other["event"], other["message"], other["fields"]) == ("log", "3 of them", {"logger": "other"})


def test_text_goes_to_the_stream_of_the_moment_once_however_often_logs_are_set_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs([])
    set_up_logs([])
    event("shard", "a line")
    log("verified", "a result")
    assert capsys.readouterr() == ("a result\n", "a line\n")


def test_a_crash_is_one_json_line_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs(["--log-format", "json"])
    try:
        raise KeyError("gone")
    except KeyError as error:
        log_crash(error, 1)
    (record,) = records(capsys.readouterr().err)
    assert record["event"] == "crashed" and "please report" in record["message"]
    assert 'raise KeyError("gone")' in record["fields"]["traceback"] and record["fields"]["exit_code"] == 1


_ABOVE_THE_BAR = """
import time
from capgap.jobs.logs import set_up_logs
from capgap.pipeline.stage.events import event
from capgap.pipeline.stage.progress import progress
set_up_logs([])
with progress("cache", 20, "sequences", lines=False) as meter:
    for number in range(20):
        meter.advance()
        event("shard", f"shard {number} is whole")
        time.sleep(0.05)
"""


def test_on_a_terminal_every_line_stands_whole_above_the_bar() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _ABOVE_THE_BAR], stderr=child, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while part := os.read(parent, 4096):
            shown += part
    os.close(parent)
    assert process.wait() == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain)]
    assert [line for line in lines if "is whole" in line] == [f"shard {number} is whole" for number in range(20)]
    assert "20/20" in plain


def test_stderr_is_looked_up_when_something_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_up_logs([])
    with (tmp_path / "above-the-bar").open("w") as other:
        monkeypatch.setattr(sys, "stderr", other)
        event("shard", "a line")
    assert (tmp_path / "above-the-bar").read_text() == "a line\n"


def test_a_format_of_the_environment_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "xml")
    assert main(["ls"]) == 2
    assert capsys.readouterr().err == "capgap: CAPGAP_LOG_FORMAT: no such format; found xml, expected text or json\n"
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "xml")
    assert main(["--version"]) == 2
    monkeypatch.setenv("CAPGAP_LOG_FORMAT", "xml")
    assert main(["completion", "bash", "--log-format", "text"]) == 0
