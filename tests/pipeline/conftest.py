"""A folder of texts, and run files that make a corpus of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Any

import fsspec
import numpy as np
import pytest

from capgap.schemas.run_file import RunFile

NUM_TEXTS = 60


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty short texts of made-up words, no two alike."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(5)
    words = ["".join(rng.choice(list("aeioubcdfglmnprst"), size)) for size in rng.integers(2, 9, 300)]
    for number in range(NUM_TEXTS):
        lines = (" ".join(rng.choice(words, 12)) for _ in range(int(rng.integers(5, 25))))
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_corpus_run(texts: Path, tmp_path: Path) -> Callable[..., RunFile]:
    """A run file over the texts, with other settings of `corpus` where they are given."""

    def make(out: str = "out", **corpus: Any) -> RunFile:
        settings = {"sources": [str(texts)], "vocab_size": 400, "seq_len": 32, "shard_sequences": 100}
        settings |= {"teacher_fraction": 0.5, "heldout_fraction": 0.2}
        return RunFile.model_validate(
            {
                "name": "tried",
                "out": str(tmp_path / out),
                "corpus": {name: value for name, value in (settings | corpus).items() if value is not None},
                "teacher": {"model": {}},
                "student": {"model": {}},
            }
        )

    return make


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
