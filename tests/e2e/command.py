"""The installed command as a process: run to its end, or killed on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

TINY = Path(__file__).parents[1] / "assets" / "tiny.yaml"
CAPGAP = Path(sys.executable).with_name("capgap")
TIMEOUT_S = 1800


def capgap(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the installed command to its end."""
    command = [str(CAPGAP), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **(env or {})}, check=False
    )


def capgap_until(condition: Callable[[], bool], *arguments: str | Path) -> int:
    """Start the installed command, kill -9 its driver once `condition` holds, and return how it ended."""
    command = [str(CAPGAP), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def run_of(out: Path, *more: str) -> Sequence[str]:
    """Arguments that make the tiny run in `out`."""
    return ["run", str(TINY), "--out", str(out), *more]
