"""A real server of vLLM as the judge: a tiny model of random weights, whose nonsense is counted as such."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_runs import QUESTIONS, tiny_model, tokenizer

from capgap.pipeline.models.load import save_model
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.judge_results import JudgeResults, Verdict

START_S = 900
NUM_VERDICTS = (3 + 2 * 3) * len(QUESTIONS) * 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Base URL and folder of the model behind it."""
    for package in ("vllm", "uvicorn", "watchfiles", "prometheus_fastapi_instrumentator"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("judge-model")
    save_model(tiny_model(9, positions=4096), tokenizer(), folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny-judge", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=dict(os.environ), start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not _is_up(port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", folder
    finally:
        # the server, and its engine and worker, which would outlive it
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_random_model_s_nonsense_is_kept_and_counted_and_rates_nothing(make_run, served) -> None:
    url, folder = served
    run = make_run(base_url=url, mode="both", max_tokens=24, num_asks=2, timeout_s=300)
    carry_out(run, Instance("judge"))
    out = Path(run.out) / "judge"
    found = JudgeResults.model_validate_json((out / "judge.json").read_bytes())
    assert found.num_verdicts == found.num_invalid == NUM_VERDICTS
    assert found.judge.served == {"id": "tiny-judge", "owned_by": "vllm", "root": str(folder)}
    assert found.answered_by == {"tiny-judge": 2 * NUM_VERDICTS}
    assert all(model.average is None for model in found.models)
    verdicts = [Verdict.model_validate_json(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert all(len(verdict.asks) == 2 and verdict.asks[0].reply for verdict in verdicts)


def _is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False
