"""One stage in several processes, started by capgap itself or by torchrun: they work, fail and die as one.

The stage is the training of a small teacher, which needs a corpus and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from capgap.pipeline.stage.command import typed_command
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.stage.ranks import Ranks, Rendezvous, ranks_in_environment
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.pipeline.workflow.launch import _surroundings
from capgap.pipeline.workflow.together import LostRankError, _as_one_voice
from capgap.schemas.errors import MachineError

BIN = Path(sys.executable).parent
TEACHER = Instance("teacher")
TIMEOUT_S = 1800


@pytest.fixture
def run_file(make_corpus_run, tmp_path) -> Callable[..., Path]:
    """A run whose corpus is made."""
    run = make_corpus_run()
    carry_out(run, Instance("corpus"))

    def make(**training: object) -> Path:
        settings = yaml.safe_load(run.model_dump_json())
        shape = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
        given = {"batch_sequences": 4, "log_every_steps": 1, "checkpoint_every_steps": 5, "num_epochs": 2}
        settings["teacher"] = {"model": shape, "training": given | training}
        settings["device"] = "cpu"
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return make


def _out(run_file: Path) -> Path:
    return Path(yaml.safe_load(run_file.read_text())["out"]) / "teacher"


def _capgap(*words: object) -> list[str]:
    return [str(BIN / "capgap"), "teacher", *map(str, words)]


def _torchrun(*words: object) -> list[str]:
    # as the command does: its script may stand in another environment's folder
    start = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, "--no-python", *_capgap(*words)]


def _end(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def _said(stderr: str, by_torchrun: bool = False) -> list[str]:
    """What capgap has said, and nothing has crashed; torchrun itself prints how its processes ended."""
    assert by_torchrun or "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("capgap: ")]


@pytest.mark.slow
def test_devices_of_one_machine_train_one_model_and_so_do_the_processes_of_torchrun(run_file) -> None:
    path, weights = run_file(), {}
    for name, command in {
        "one": _capgap(path),
        "ddp": _capgap(path, "--teacher.training.num_devices", 2),
        "fsdp2": _capgap(path, "--teacher.training.num_devices", 2, "--teacher.training.strategy", "fsdp2"),
        "torchrun": _torchrun(path),
    }.items():
        done = _end([*command, "--force"])
        assert done.returncode == 0, done.stderr
        weights[name] = load_file(_out(path) / "model" / "model.safetensors")
        assert not (_out(path) / "work").exists()
    manifest = read_manifest(_out(path))
    assert manifest is not None and manifest.totals["num_epochs"] == 2
    for key, tensor in weights["one"].items():
        assert tensor.equal(weights["one"][key])
        for other in ("ddp", "fsdp2"):
            # sums in another order, over some fifty steps
            assert (tensor - weights[other][key]).norm() < 1e-3 * tensor.norm(), (other, key)
        assert weights["torchrun"][key].equal(weights["ddp"][key])
    again = _end(_torchrun(path))
    assert again.returncode == 0 and again.stderr.count("teacher is current: nothing to do") == 1


@pytest.mark.parametrize("start", [_capgap, pytest.param(_torchrun, marks=pytest.mark.slow)])
def test_a_step_that_does_not_divide_among_the_ranks_is_refused_in_one_line(run_file, start) -> None:
    path = run_file(batch_sequences=3, num_devices=2)
    done = _end(start(path))
    assert done.returncode != 0
    assert _said(done.stderr, start is _torchrun) == [
        "capgap: batch_sequences: a step does not divide among the devices; found 3 sequences on 2 devices, expected a "
        "multiple of 2; change batch_sequences, micro_batch_sequences or the number of devices"
    ]
    assert not _out(path).exists()


@pytest.mark.parametrize("start", [_capgap, pytest.param(_torchrun, marks=pytest.mark.slow)])
def test_an_error_of_one_rank_ends_all_of_them_with_its_one_line(run_file, start) -> None:
    path = run_file(num_devices=2, micro_batch_sequences=1)
    _damage_last_member(_out(path).parent / "corpus")
    done = _end(start(path))
    assert done.returncode != 0
    (line,) = _said(done.stderr, start is _torchrun)
    assert "member" in line and "checksum mismatch" in line


def _damage_last_member(corpus: Path) -> None:
    manifest = read_manifest(corpus)
    assert manifest is not None
    shard = manifest.shard_sets["teacher"].shards[-1]
    last = len(shard.members.num_sequences) - 1
    with (corpus / shard.file.path).open("r+b") as file:
        file.seek(shard.member(last).offset + 20)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_a_killed_parent_leaves_none(run_file) -> None:
    path = run_file(num_devices=2, num_epochs=1000)
    with _started(_capgap(path)) as process:
        ranks = _ranks_at_work(process, path)
        os.kill(ranks[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode not in (0, -signal.SIGKILL)
    (line,) = _said(stderr)
    assert re.fullmatch(r"capgap: rank \d: teacher failed; found killed by signal 9; mend .* again", line)
    assert not _alive(ranks)
    with _started(_capgap(path)) as process:
        ranks = _ranks_at_work(process, path)
        process.kill()
        process.wait()
        deadline = time.monotonic() + TIMEOUT_S
        while _alive(ranks):
            assert time.monotonic() < deadline, "orphans"
            time.sleep(0.05)
    # the lease and the folder are free, and the training goes on
    done = _end(_capgap(path, "--teacher.training.num_epochs", 1, "--force"))
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ranks_at_work(process: subprocess.Popen[str], path: Path) -> list[int]:
    """Process ids of both ranks, once a step has been taken."""
    metrics, deadline = _out(path) / "metrics.csv", time.monotonic() + TIMEOUT_S
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while not (metrics.exists() and metrics.stat().st_mtime_ns > before and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = sorted(int(child) for child in _children(process.pid))
    assert len(ranks) == 2
    return ranks


def _children(parent: int) -> list[str]:
    return [c for task in Path(f"/proc/{parent}/task").iterdir() for c in (task / "children").read_text().split()]


def _alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            # a zombie that its parent has not asked for is gone all the same
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def test_a_process_of_its_own_has_no_ranks_and_half_a_launcher_is_refused(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_in_environment() is None
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert ranks_in_environment() == Ranks(5, 8, 1, 4)
    assert Ranks(5, 8, 1, 4).node == 1 and not Ranks(5, 8, 1, 4).is_first
    for name, value in (("RANK", "8"), ("LOCAL_RANK", "one"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
        with pytest.raises(MachineError, match=rf"variables do not say which process this is; found .*{name}={value}"):
            ranks_in_environment()
        monkeypatch.setenv(name, given[name])
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(MachineError, match="RANK=5, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4, expected whole numbers in RANK"):
        ranks_in_environment()
    # a scheduler may set the rank of the only process
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert ranks_in_environment() is None
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(MachineError, match="RANK=5, WORLD_SIZE=8, LOCAL_WORLD_SIZE=4, expected whole numbers in RANK"):
        ranks_in_environment()


def test_a_later_rank_whose_error_has_no_text_is_silent_too(monkeypatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # the store has one process here, and the rank that failed first is played by this one
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    rendezvous = Rendezvous(Ranks(1, 2, 1, 2), "teacher")
    assert rendezvous.is_first_to_fail()
    lost = _as_one_voice(AssertionError(), TEACHER, rendezvous)
    assert isinstance(lost, LostRankError) and lost.already_said
    assert lost.found == "AssertionError"


def test_ranks_know_the_command_that_was_typed(monkeypatch) -> None:
    typed = ["capgap", "train", "my run.yaml"]
    monkeypatch.delenv("CAPGAP_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", typed)
    with _surroundings(2):
        monkeypatch.setattr(sys, "argv", ["cli.py", "train", "--config", "gone.json"])
        assert typed_command() == typed
    assert "CAPGAP_COMMAND" not in os.environ
