"""Real processes for the tests of faults: forked by the zygote, and killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TIMEOUT_S = 1800


class Zygote:
    """Starts `capgap` within milliseconds, as real processes with sessions of their own; one at a time.

    Args:
        logs: folder that receives what they print.
    """

    def __init__(self, logs: Path) -> None:
        self._logs, self._number = logs, 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # a thread that runs before the fork could hold a lock for ever in the child
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def run(self, *arguments: str | Path, kill_after_s: float | None = None) -> tuple[int, str]:
        """Run a command, kill its whole session if it still runs after that time; how it ended and what it printed."""
        log = self._begin(arguments)
        pid = int(self._answer())
        if kill_after_s is not None:
            _sleep_while_alive(pid, kill_after_s)
            kill(pid)
        return int(self._answer()), log.read_text(errors="replace")

    def start(self, *arguments: str | Path) -> int:
        """Begin a command and return its pid; `end` must follow."""
        self._log = self._begin(arguments)
        return int(self._answer())

    def end(self) -> tuple[int, str]:
        """Wait for what `start` began; as `run`."""
        return int(self._answer()), self._log.read_text(errors="replace")

    def close(self) -> None:
        """End it; a child that still runs is killed with it by the test that started it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _begin(self, arguments: tuple[str | Path, ...]) -> Path:
        self._number += 1
        log = self._logs / f"{self._number:05d}.txt"
        log.touch()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": list(map(str, arguments)), "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return log

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote has ended"
        return line.strip()


def one_line(output: str) -> str:
    """The one line that an error is; nothing else may speak of it."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("capgap: ")]
    assert len(lines) == 1, output
    return lines[0]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pid: int) -> None:
    """kill -9 a process and its session, where it still runs."""
    with contextlib.suppress(ProcessLookupError):
        # just forked, it has no session of its own yet, and no child
        os.killpg(pid, signal.SIGKILL) if os.getpgid(pid) == pid else os.kill(pid, signal.SIGKILL)


def _sleep_while_alive(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and is_alive(pid):
        time.sleep(min(left, 0.02))
