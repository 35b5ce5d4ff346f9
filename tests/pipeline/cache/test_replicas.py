"""Real Ray, real engines, real kills."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from capgap.pipeline.cache.replicas import make_by_replicas
from capgap.pipeline.cache.shards import SCORED_FOLDER
from capgap.pipeline.cache.stage import prepare
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.fleet import MAX_DEATHS
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.stage.ray_cluster import ray_cluster
from capgap.pipeline.store.extras import adding
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MachineError
from capgap.schemas.run_file import RunFile
from capgap.schemas.run_model import TeacherSettings

pytest.importorskip("ray")

CACHE = Instance("cache")
DEADLINE_S = 1800


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """A mark in the environment of every process that the test starts, and theirs; all are gone in the end."""
    value = f"CAPGAP_TEST_MARK={os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(*value.split("="))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield value
    for pid in _marked(value):
        os.kill(pid, signal.SIGKILL)


def _marked(mark: str, title: str = "") -> list[int]:
    """Living processes with that mark, and with those words in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = mark.encode() in (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if marked and command and title in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def _shards(run: RunFile) -> int:
    return len(list((Path(run.out) / "cache" / "work" / "scored").glob("*.json")))


@pytest.mark.slow
def test_two_replicas_make_the_cache_that_one_process_makes_and_ray_is_not_heard(run, start, mark, whole) -> None:
    tiny = run(replicas=2)
    process = start(tiny, "--no-wait")
    output, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, error
    assert read_manifest(Path(tiny.out) / "cache").content == whole
    assert output == ""
    assert all(line.startswith("cache: ") for line in error.splitlines()), error
    _until(lambda: not _marked(mark))


@pytest.mark.slow
def test_the_shards_of_a_killed_replica_are_made_by_others(run, start, mark, whole) -> None:
    tiny = run(replicas=2)
    process = start(tiny)
    _until(lambda: _shards(tiny) >= 2 or process.poll() is not None)
    for pid in _marked(mark, "ray::Replica")[:1]:
        os.kill(pid, signal.SIGKILL)
    # what a replica leaves that is killed while it writes
    (Path(tiny.out) / "cache" / "sampled-000019.tar.partial-0123456789ab").write_bytes(b"half")
    output, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, error
    assert read_manifest(Path(tiny.out) / "cache").content == whole
    assert output == ""
    assert all(line.startswith("cache: ") for line in error.splitlines()), error


@pytest.mark.slow
def test_nothing_outlives_a_killed_stage_and_the_same_command_goes_on(run, start, mark, whole) -> None:
    tiny = run(replicas=2)
    process = start(tiny)
    _until(lambda: _shards(tiny) >= 2 or process.poll() is not None)
    process.kill()
    process.communicate()
    # engines and Ray itself; its agents, which do no work, end about a minute later
    _until(lambda: not any(_marked(mark, title) for title in ("ray::Replica", "raylet/raylet", "gcs_server")))
    assert _shards(tiny) >= 2
    assert carry_out(run(), CACHE).content == whole


def test_what_the_user_can_mend_is_said_once_in_one_line(run, inputs, start, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(inputs["teacher"]["path"], tmp_path / "teacher-without-numbers"))
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    changed = {"reuse": {"corpus": str(Path(inputs["out"]) / "corpus")}, "teacher": TeacherSettings(path=str(folder))}
    tiny = run(replicas=2, max_tokens=512).model_copy(update=changed)
    carry_out(tiny, Instance("teacher"))
    process = start(tiny)
    _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2
    (line,) = [line for line in error.splitlines() if line.startswith("capgap: ")]
    assert "the teacher's logits are not finite" in line


@pytest.mark.slow
def test_a_shard_at_which_replicas_keep_dying_stops_the_stage_by_name(run, mark, context_of) -> None:
    tiny = run(replicas=2)
    context = context_of(tiny)
    job = prepare(context)
    # whoever looks whether this shard is finished waits until it is killed: there is nobody at the pipe's other end
    (job.work / SCORED_FOLDER).mkdir()
    os.mkfifo(job.work / SCORED_FOLDER / "000001.json")
    made: list[int] = []
    killed: list[int] = []

    def kill() -> None:
        while not stopped.wait(0.05):
            for pid in _waiting_at_a_pipe(mark):
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

    stopped = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(MachineError, match="shard 1: a replica died 3 times while it made this shard") as caught:
            for index, _ in make_by_replicas(job, [0, 1, 2], context):
                made.append(index)
    finally:
        stopped.set()
        killer.join()
    assert 1 not in made and len(set(killed)) == MAX_DEATHS
    logs = Path(str(caught.value).rsplit(" ", 1)[-1])
    assert list(logs.glob("worker-*.err"))
    shutil.rmtree(logs)


def _waiting_at_a_pipe(mark: str) -> list[int]:
    """Replicas of which a thread is in `open` until somebody opens the pipe's other end."""
    found = []
    for pid in _marked(mark, "ray::Replica"):
        with contextlib.suppress(OSError):
            if any(path.read_text() == "wait_for_partner" for path in Path(f"/proc/{pid}/task").glob("*/wchan")):
                found.append(pid)
    return found


def test_more_replicas_than_gpus_are_refused() -> None:
    said = r"cache\.replicas: too few GPUs; found room for 0 replicas of 2 GPUs, expected 3"
    with pytest.raises(MachineError, match=said), ray_cluster(3, 2, "cache.replicas"):
        pytest.fail("there is no GPU")


def test_without_ray_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = re.escape(f"Ray is not installed; run {adding('ray')}, or start slices")
    with pytest.raises(MachineError, match=said), ray_cluster(2, 0, "cache.replicas"):
        pytest.fail("there is no Ray")


@pytest.fixture
def short() -> Iterator[str]:
    """A folder whose path leaves room for those of sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.slow
def test_a_cluster_that_runs_is_joined_and_left_running(run, start, mark, whole, monkeypatch, short) -> None:
    # both sides must have one: newer versions of Ray ask for a token unless they are told not to
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = Path(sys.executable).with_name("ray")
    started = subprocess.run(
        [ray, "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", f"--temp-dir={short}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    monkeypatch.setenv("RAY_ADDRESS", started.stdout.split("address='")[1].split("'")[0])
    tiny = run(replicas=2)
    process = start(tiny)
    output, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, error
    assert read_manifest(Path(tiny.out) / "cache").content == whole
    assert output == ""
    assert _marked(mark, "raylet")
    refused = start(run(replicas=3, seed=1), "--force")
    _, error = refused.communicate(timeout=DEADLINE_S)
    assert refused.returncode == 3 and "cache.replicas: too few CPUs; found 2, expected 3" in error


@pytest.mark.slow
def test_two_replicas_of_vllm_make_the_cache_that_one_makes(run, start) -> None:
    pytest.importorskip("vllm")
    contents = []
    for replicas in (1, 2):
        tiny = run(engine="vllm", replicas=replicas, max_tokens=32 * 8 * 4)
        process = start(tiny, "--force")
        _, error = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, error
        contents.append(read_manifest(Path(tiny.out) / "cache").content)
    assert contents[0] == contents[1]
