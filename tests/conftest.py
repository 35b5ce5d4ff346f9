"""The environment of every test, set before the first of them imports torch or vLLM."""

import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

# an example may take long on a busy machine
settings.register_profile("capgap", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("capgap")
# here, and not in a hook: conftest.py of a folder that is named to pytest is imported before hooks run
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")


def pytest_configure(config: pytest.Config) -> None:
    leases = tempfile.mkdtemp(prefix="capgap-leases-")
    config.add_cleanup(lambda: shutil.rmtree(leases, ignore_errors=True))
    # a run of the user's on this machine neither waits for a test nor makes it wait
    os.environ["CAPGAP_LEASE_DIR"] = leases
    # a shell starts what it puts into the background with interrupts ignored, and so would be whatever that starts
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums come out alike on any machine


class _ByFile(LoadFileScheduling):  # type: ignore[misc]
    """Tests of a file go to one process, and those of tests/e2e too: they share a run that takes minutes."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/e2e" if nodeid.startswith("tests/e2e/") else str(super()._split_scope(nodeid))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)


@pytest.fixture(autouse=True)
def _log_format() -> Iterator[None]:
    """A command that a test runs in its own process decides nothing for the tests after it."""
    before = os.environ.get("CAPGAP_LOG_FORMAT")
    yield
    os.environ.pop("CAPGAP_LOG_FORMAT", None)
    if before is not None:
        os.environ["CAPGAP_LOG_FORMAT"] = before


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Puts a folder behind a URL of a web server on this machine, as long as the test runs."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as stack:

        def start(folder: Path) -> str:
            server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_QuietFiles, directory=str(folder)))
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_port}"

        yield start


class _QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


# Flask, in the process in which vLLM starts, would break vLLM's walk over all modules. The server ends with its input.
_S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    for name in ("s3fs", "moto", "flask_cors"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    with subprocess.Popen([sys.executable, "-P", "-c", _S3_SERVER], stdin=PIPE, stdout=PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        host, port = server.stdout.readline().split()
        yield f"http://{host}:{port}"
        server.stdin.close()


@pytest.fixture
def s3_server(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address; clients in this process, and in those it starts, find it through the environment."""
    given = {"AWS_ENDPOINT_URL": s3_address, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    for name, value in (given | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    # one server holds what every test has put there
    urllib.request.urlopen(urllib.request.Request(f"{s3_address}/moto-api/reset", method="POST")).close()
    fsspec.filesystem("s3").clear_instance_cache()
    yield s3_address
    fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A chromium that is installed here; what needs it is skipped elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found)
        yield browser
        browser.close()
