"""A real server of vLLM on this machine, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

START_S = 900


@contextmanager
def vllm_server(folder: Path | str, name: str, log: Path, *flags: str) -> Iterator[str]:
    """Serves a folder's model under a name, and yields the base URL; skips where vLLM's server is not installed."""
    for package in ("vllm", "uvicorn", "watchfiles", "prometheus_fastapi_instrumentator"):
        pytest.importorskip(package)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "8", *flags]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=dict(os.environ), start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not _is_up(port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        # the server, and its engine and worker, which would outlive it
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _is_up(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False
