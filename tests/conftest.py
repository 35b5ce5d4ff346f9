"""The environment of every test, set before the first of them imports torch or vLLM."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest


def pytest_configure(config: pytest.Config) -> None:
    leases = tempfile.mkdtemp(prefix="capgap-leases-")
    config.add_cleanup(lambda: shutil.rmtree(leases, ignore_errors=True))
    os.environ.update(
        CAPGAP_LEASE_DIR=leases,  # a run of the user's on this machine neither waits for a test nor makes it wait
        TOKENIZERS_PARALLELISM="false",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
    )
    # a shell starts what it puts into the background with interrupts ignored, and so would be whatever that starts
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums come out alike on any machine


@pytest.fixture(autouse=True)
def _log_format() -> Iterator[None]:
    """A command that a test runs in its own process decides nothing for the tests after it."""
    before = os.environ.get("CAPGAP_LOG_FORMAT")
    yield
    os.environ.pop("CAPGAP_LOG_FORMAT", None)
    if before is not None:
        os.environ["CAPGAP_LOG_FORMAT"] = before
