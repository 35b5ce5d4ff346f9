"""File systems without locks or inodes, machines that locks do not reach, packages of another version."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from other_machine import preloaded
from processes import TIMEOUT_S, Zygote, kill, one_line
from test_machine import CAPGAP, Disk, content_of, disk, wait_for, with_inputs

__all__ = ["disk"]

LOCK = """
import sys
from pathlib import Path
from capgap.pipeline.store.locks import ProcessLock
from capgap.schemas.errors import MachineError
for name in sys.argv[1:]:
    try:
        with ProcessLock(Path(name)) as lock:
            lock.exclusive(wait=True)
    except MachineError as error:
        print(error.exit_code, error)
"""
# At work as any stage is, until it is ended.
AT_WORK = """
import sys, time
from pathlib import Path
from capgap.pipeline.stage.heartbeat import heartbeat
with heartbeat(Path(sys.argv[1])):
    print("begun", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named_and_never_waited_for(tmp_path: Path, number: int) -> None:
    environment = preloaded(tmp_path, MACHINE_FLOCK=str(number), MACHINE_FOLDER=str(tmp_path))
    command = [sys.executable, "-c", LOCK, str(tmp_path / "lock")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=True)
    assert done.stdout.startswith(f"3 {tmp_path}/lock: this file system has no locks; found {os.strerror(number)}")


def test_a_run_on_a_file_system_without_locks_is_one_line_and_makes_nothing(tmp_path: Path, run_file: Path) -> None:
    out = tmp_path / "out"
    environment = preloaded(tmp_path, MACHINE_FLOCK=str(errno.ENOLCK), MACHINE_FOLDER=str(out))
    done = _capgap("corpus", run_file, "--out", out, env=environment)
    assert done.returncode == 3, done.stderr
    assert f"{out / 'corpus' / '.lock'}: this file system has no locks" in one_line(done.stderr)
    assert [path.name for path in (out / "corpus").iterdir()] == [".lock"]


@pytest.mark.slow
def test_of_two_machines_whose_locks_do_not_meet_the_second_is_told(
    copy: Path, made: Path, run_file: Path, tmp_path: Path
) -> None:
    """As on NFS that is mounted with `local_lock`: each machine has the lock."""
    _unfinish(copy)
    nobody_else = {"MACHINE_FLOCK": "0", "MACHINE_FOLDER": str(copy)}
    first = subprocess.Popen(
        [sys.executable, "-c", AT_WORK, str(copy / "cache" / "work")],
        env=preloaded(tmp_path, MACHINE_NAME="first", **nobody_else),
        stdout=subprocess.PIPE,
        text=True,
    )
    command = ("cache", run_file, "--out", copy)
    environment = preloaded(tmp_path, MACHINE_NAME="second", **nobody_else)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "begun\n"
        before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != "progress.json"}
        done = _capgap(*command, env=environment)
        assert done.returncode == 3, done.stderr
        line = one_line(done.stderr)
        assert f"{copy / 'cache'}: another machine is at work on this folder" in line
        assert f"pid {first.pid} of first" in line
        for path, then in before.items():
            assert path.is_dir() or path.stat().st_mtime_ns == then, path
    finally:
        first.kill()
        first.wait()
    # killed without a word, it is watched for a while, and then nobody is there
    began = time.monotonic()
    done = _capgap(*command, env=environment)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began > 15
    assert content_of(copy / "cache") == content_of(made / "cache")


@pytest.mark.parametrize("stage", ["corpus", "cache"])
def test_a_full_table_of_inodes_is_one_line_and_loses_nothing(
    zygote: Zygote, disk: Disk, made: Path, run_file: Path, stage: str
) -> None:
    out = with_inputs(made, disk.folder / "out", stage)
    found = os.statvfs(disk.folder)
    # some of what the stage makes
    disk.remount(f"nr_inodes={found.f_files - found.f_ffree + 8}")
    code, said = zygote.run(stage, run_file, "--out", out)
    assert code == 3, said
    line = one_line(said)
    assert "no file can be made any more" in line and "no inode left" in line
    assert not (out / stage / "manifest.json").exists()
    disk.remount("nr_inodes=100000")
    code, said = zygote.run(stage, run_file, "--out", out)
    assert code == 0, said
    assert content_of(out / stage) == content_of(made / stage)


def test_a_stage_goes_on_after_an_upgrade_and_says_so(
    zygote: Zygote, copy: Path, made: Path, run_file: Path, tmp_path: Path
) -> None:
    _unfinish(copy)
    pid = zygote.start("cache", run_file, "--out", copy)
    wait_for(copy / "cache" / "work" / "plan.json")
    kill(pid)
    zygote.end()
    before = importlib.metadata.version("torch")
    # what a newer one would have put there
    newer = tmp_path / "site" / "torch-2.99.0.dist-info"
    newer.mkdir(parents=True)
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.99.0\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}

    done = _capgap("status", run_file, "--out", copy, env=environment)
    assert f"begun with torch {before}, now 2.99.0" in " ".join(done.stdout.split()), done.stdout
    assert "corpus" in done.stdout and done.stdout.count("2.99.0") == 1

    done = _capgap("cache", run_file, "--out", copy, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"begun with torch {before}, now 2.99.0" in done.stderr
    manifest = json.loads((copy / "cache" / "manifest.json").read_text())
    assert (manifest["versions"]["torch"], manifest["earlier_versions"]) == ("2.99.0", [{"torch": before}])
    assert content_of(copy / "cache") == content_of(made / "cache")


def _unfinish(copy: Path) -> None:
    shutil.rmtree(copy / "cache")
    (copy / "cache" / "work").mkdir(parents=True)


def _capgap(*words: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CAPGAP, *words], env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
