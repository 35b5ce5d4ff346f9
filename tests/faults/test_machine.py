"""A machine that fails: no space, no writing, inputs that vanish, two at one folder, a clock that runs backwards.

Each is one clear line, and the same command afterwards makes what an undisturbed run makes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_machine import preloaded
from processes import TIMEOUT_S, Zygote, kill, one_line

CAPGAP = Path(sys.executable).with_name("capgap")
# About half of what a stage writes fits.
STAGES = {"corpus": ("corpus", 120), "cache": ("cache", 60), "train": ("train/distilled/seed-0", 400)}
INPUTS = ("corpus", "teacher", "cache", "student")


class Disk:
    """A small file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=64m", "none", str(folder))

    def remount(self, options: str) -> None:
        """Another size, or `ro`."""
        self._mount("-o", f"remount,{options}", str(self.folder))

    def fill(self, left_kib: int) -> None:
        """Leave that much room."""
        used = shutil.disk_usage(self.folder).used // 1024
        self.remount(f"size={used + left_kib}k")

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("a small file system is mounted for this test, which only root may do")
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=False)


def content_of(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["content"])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.002)


def with_inputs(made: Path, out: Path, stage: str) -> Path:
    for name in INPUTS[: [*INPUTS, "train"].index(stage)]:
        shutil.copytree(made / name, out / name)
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_loses_nothing(
    zygote: Zygote, disk: Disk, made: Path, run_file: Path, stage: str
) -> None:
    folder, left_kib = STAGES[stage]
    out = with_inputs(made, disk.folder / "out", stage)
    disk.fill(left_kib)
    code, said = zygote.run(stage, run_file, "--out", out)
    assert code != 0, "the disk was not full: lower what is left"
    line = one_line(said)
    assert "no space is left" in line and "run the same command again" in line
    assert not (out / folder / "manifest.json").exists()
    disk.remount("size=64m")
    code, said = zygote.run(stage, run_file, "--out", out)
    assert code == 0, said
    assert content_of(out / folder) == content_of(made / folder)


@pytest.mark.parametrize("stage", STAGES)
def test_an_output_that_cannot_be_written_is_one_line(
    zygote: Zygote, disk: Disk, made: Path, run_file: Path, stage: str
) -> None:
    out = with_inputs(made, disk.folder / "out", stage)
    disk.remount("ro")
    code, said = zygote.run(stage, run_file, "--out", out)
    assert code != 0
    assert "cannot be written" in one_line(said) and str(disk.folder) in said
    disk.remount("rw")
    code, said = zygote.run(stage, run_file, "--out", out)
    assert code == 0, said
    assert content_of(out / STAGES[stage][0]) == content_of(made / STAGES[stage][0])


@pytest.mark.parametrize(("stage", "lost"), [("cache", "corpus"), ("train", "cache")])
def test_an_input_that_vanishes_is_one_line_and_the_rest_is_made_when_it_is_back(
    zygote: Zygote, copy: Path, made: Path, run_file: Path, stage: str, lost: str
) -> None:
    folder = copy / STAGES[stage][0]
    shutil.rmtree(folder)
    pid = zygote.start(stage, run_file, "--out", copy)
    wait_for(folder / "work" / "plan.json")
    os.kill(pid, signal.SIGSTOP)
    shutil.rmtree(copy / lost)
    os.kill(pid, signal.SIGCONT)
    code, said = zygote.end()
    assert code != 0
    assert str(copy / lost) in one_line(said) and "missing" in said
    assert not (folder / "manifest.json").exists()
    shutil.copytree(made / lost, copy / lost)
    code, said = zygote.run(stage, run_file, "--out", copy)
    assert code == 0, said
    assert content_of(folder) == content_of(made / STAGES[stage][0])


def test_a_text_that_vanishes_before_it_is_read_is_one_line(zygote: Zygote, tmp_path: Path, run_file: Path) -> None:
    source = tmp_path / "text.txt"
    source.symlink_to(tmp_path / "gone.txt")
    code, said = zygote.run("corpus", run_file, "--out", tmp_path / "out", f"--corpus.sources=[{source}]")
    assert code != 0 and str(source) in one_line(said)


def test_of_two_processes_on_one_folder_the_second_is_told_and_the_first_is_undisturbed(
    zygote: Zygote, copy: Path, made: Path, run_file: Path
) -> None:
    shutil.rmtree(copy / "cache")
    first = zygote.start("cache", run_file, "--out", copy)
    try:
        wait_for(copy / "cache" / "work" / "plan.json")
        os.kill(first, signal.SIGSTOP)
        second = subprocess.run(
            [CAPGAP, "cache", run_file, "--out", copy], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert second.returncode != 0
        assert f"{copy / 'cache'}: another process is at work on this folder" in one_line(second.stderr)
        os.kill(first, signal.SIGCONT)
    except BaseException:
        kill(first)
        raise
    code, said = zygote.end()
    assert code == 0, said
    assert content_of(copy / "cache") == content_of(made / "cache")


@pytest.mark.parametrize("stage", STAGES)
def test_a_clock_that_jumps_to_and_fro_changes_nothing(tmp_path: Path, made: Path, run_file: Path, stage: str) -> None:
    out = with_inputs(made, tmp_path / "out", stage)
    environment = preloaded(tmp_path, MACHINE_CLOCK="jumps")
    probe = "import time; a, b, c, d = (time.time() for _ in range(4)); print(a > c and b > d and abs(a - b) > 1e8)"
    found = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"
    done = subprocess.run(
        [CAPGAP, stage, run_file, "--out", out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert content_of(out / STAGES[stage][0]) == content_of(made / STAGES[stage][0])
