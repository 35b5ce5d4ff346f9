"""The same with a real vLLM, in ordinary processes: the stage killed between shards, its driver, and a worker of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import TIMEOUT_S, is_alive, one_line

pytest.importorskip("vllm", reason="vLLM is not installed")
psutil = pytest.importorskip("psutil", reason="comes with vLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's build for GPUs does not run on a CPU"),
]

CAPGAP = Path(sys.executable).with_name("capgap")
# A few sequences a pass of the model: shards take long enough for a kill to fall within one.
ENGINE = ("--cache.engine", "vllm", "--cache.batch_tokens", "64")


def start(run_file: Path, out: Path, *arguments: str, command: str = "cache") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [CAPGAP, command, run_file, "--out", out, *ENGINE, *arguments], stderr=subprocess.PIPE, text=True
    )


def wait_for_shards(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(list((out / "cache" / "work" / "scored").glob("*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def content_of(out: Path) -> str:
    return str(json.loads((out / "cache" / "manifest.json").read_text())["content"])


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    for name in ("corpus", "teacher"):
        shutil.copytree(made / name, tmp_path / "out" / name)
    return tmp_path / "out"


def test_a_cache_killed_between_shards_and_with_its_driver_ends_in_what_an_undisturbed_one_is(
    run_file: Path, made: Path, out: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    undisturbed = start(run_file, whole)
    assert undisturbed.wait(TIMEOUT_S) == 0, undisturbed.communicate()[1]
    for count, command in ((1, "cache"), (4, "run"), (8, "cache")):
        more = () if command == "cache" else ("--only", "cache")
        process = start(run_file, out, *more, command=command)
        wait_for_shards(process, out, count)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -9
        psutil.wait_procs(children, timeout=1800)
        assert not any(is_alive(child.pid) for child in children), "a stage outlived its driver"
        assert not (out / "cache" / "manifest.json").exists()
    last = start(run_file, out)
    assert last.wait(TIMEOUT_S) == 0, last.communicate()[1]
    assert content_of(out) == content_of(whole)


def test_a_worker_that_dies_within_a_shard_is_one_line_and_the_same_command_goes_on(
    run_file: Path, made: Path, out: Path
) -> None:
    process = start(run_file, out, "--cache.tensor_parallel", "2")
    wait_for_shards(process, out, 1)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    said = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode > 0
    assert "engine failed" in one_line(said)
    shards = [out / "cache" / f"sampled-{path.stem}.tar" for path in (out / "cache" / "work" / "scored").glob("*.json")]
    finished = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert finished
    again = start(run_file, out, "--cache.tensor_parallel", "2")
    said = again.communicate(timeout=TIMEOUT_S)[1]
    assert again.returncode == 0, said
    assert {shard: shard.stat().st_mtime_ns for shard in finished} == finished
    made_shards = {path.name for path in (made / "cache").glob("*.tar")}
    assert {path.name for path in (out / "cache").glob("*.tar")} == made_shards
