from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from capgap.pipeline.stage.heartbeat import heartbeat
from capgap.pipeline.stage.progress import advance_within, progress

STEPS = """
import time
from capgap.pipeline.stage.progress import progress

with progress("cache: score", 40, "sequences", 10) as meter:
    for _ in range(30):
        meter.advance(tokens=64, note="loss 1.234")
        time.sleep(0.03)
"""


def test_off_a_terminal_the_last_step_is_logged_with_rate_and_note(caplog) -> None:
    with caplog.at_level(logging.INFO, logger="capgap"), progress("train", 3, "steps") as meter:
        for _ in range(3):
            time.sleep(0.01)
            meter.advance(tokens=100, note="loss 1.5")
    *_, line = [record.getMessage() for record in caplog.records]
    found = re.fullmatch(r"train: 3 of 3 steps, ([\d,]+) tokens/s, 0 s left, loss 1\.5", line)
    assert found is not None, line
    assert 0 < float(found[1].replace(",", "")) < 10_000, "300 tokens in 0.03 s, or more on a slow machine"


def test_off_a_terminal_a_line_comes_now_and_then_with_the_time_left(caplog, monkeypatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("capgap.pipeline.stage.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    with caplog.at_level(logging.INFO, logger="capgap"), progress("eval", 100, "sequences", 50) as meter:
        clock.now += 1
        meter.advance()
        assert caplog.records == []
        clock.now += 19
        meter.advance(9)
        meter.advance(tokens=400)
        clock.now += 14
        meter.advance()
        # ten steps of this run, not the sixty of both, took 20 s: forty more take 80
        assert [record.getMessage() for record in caplog.records] == ["eval: 60 of 100 sequences, 80 s left"]
        clock.now += 1
        meter.advance(9)
    assert len(caplog.records) == 2


def test_a_terminal_shows_a_bar_with_tokens_a_second_and_time_left() -> None:
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "140"},
    )
    os.close(child)
    shown = _read_all(parent)
    assert process.wait() == 0
    assert process.stdout is not None and process.stdout.read() == b"", "results go to stdout, progress does not"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "cache: score" in plain
    counts = [int(n) for n in re.findall(r"(\d+)/40", plain)]
    assert counts[0] >= 10 and counts[-1] == 40, "what an earlier run finished is counted"
    assert counts == sorted(counts) and len(set(counts)) > 2
    rates = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tok/s", plain)]
    assert rates and 0 < rates[-1] < 1.1 * 64 / 0.03, "30 steps, 29 pauses"
    assert re.search(r"\d:\d\d:\d\d", plain), "time left"
    assert "loss 1.234" in plain


def _read_all(terminal: int) -> bytes:
    found = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side is closed
            part = b""
        if not part:
            os.close(terminal)
            return found
        found += part


def test_steps_within_a_unit_are_counted_in_the_heartbeat_and_not_twice(tmp_path: Path) -> None:
    # as an engine that knows nothing of a meter says how far a shard is
    advance_within(1)
    with heartbeat(tmp_path / "work") as beat, progress("cache: score", 12, "sequences", 2, lines=False) as meter:
        counter = beat._counter
        assert counter is not None
        assert counter().done == 2
        for _ in range(3):
            advance_within(0.5)
        assert counter().done == 3
        advance_within(2.5)
        assert counter().done == 6
        # the shard of four is written while two sequences of the next one are scored
        advance_within(2)
        meter.advance(4)
        assert counter().done == 8
        # more than there is, as of a shard that is made again, is not believed
        advance_within(50)
        assert counter().done == 12
    advance_within(1)
