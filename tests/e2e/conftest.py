"""One real run of every stage, at the smallest size, that the tests of this folder share."""

from pathlib import Path

import pytest
from command import capgap, run_of


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage that nothing disturbed, real vLLM included."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = capgap(*run_of(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out
