"""One flipped bit of a model, under its old size and time, ends whatever would read it, by its name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import Zygote, one_line


def flip(path: Path, place: int = -5) -> None:
    """One bit, and nothing else that `stat` shows."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_student_is_not_trained(zygote: Zygote, copy: Path, run_file: Path, name: str) -> None:
    damaged = copy / "student/seed-0/model" / name
    flip(damaged, damaged.stat().st_size // 2)
    shutil.rmtree(copy / "train")
    code, said = zygote.run("train", run_file, "--out", copy)
    assert code == 4, said
    line = one_line(said)
    assert f"{damaged}: the model's file is not what it was; found sha256" in line
    assert "`capgap run RUN.yaml --remake student/seed-0`" in line
    assert not list(copy.glob("train/**/*.ckpt"))
    # what the line says mends it
    code, said = zygote.run("student", run_file, "--out", copy, "--force")
    assert code == 0, said
    code, said = zygote.run("train", run_file, "--out", copy)
    assert code == 0, said


def test_a_damaged_training_is_not_measured(zygote: Zygote, copy: Path, run_file: Path) -> None:
    damaged = copy / "train/distilled/seed-0/model/model.safetensors"
    flip(damaged)
    code, said = zygote.run("eval", run_file, "--out", copy)
    assert code == 4 and f"{damaged}: the model's file is not what it was" in one_line(said), said
    assert "--remake train/distilled/seed-0" in one_line(said)


@pytest.mark.parametrize(("stage", "how"), [("cache", ["--force"]), ("eval", [])])
def test_a_given_teacher_that_changed_under_its_size_and_time_is_not_read(
    zygote: Zygote, settings: dict[str, Any], copy: Path, run_file: Path, stage: str, how: list[str]
) -> None:
    damaged = Path(settings["teacher"]["path"]) / "model.safetensors"
    flip(damaged)
    try:
        code, said = zygote.run(stage, run_file, "--out", copy, *how)
    finally:
        flip(damaged)
    assert code == 4, said
    line = one_line(said)
    assert f"{damaged}: the model's file is not what it was; found sha256" in line
    assert "fetch the model's files again" in line and "--remake teacher" in line
    # a cache that is to be replaced is still there
    assert (copy / "cache/manifest.json").is_file() and (copy / "cache/sampled-000000.tar").is_file()


def test_verify_finds_a_given_teacher_that_changed_and_says_what_is_gone(
    zygote: Zygote, settings: dict[str, Any], copy: Path, tmp_path: Path
) -> None:
    folder, run_file = tmp_path / "given", tmp_path / "run.json"
    shutil.copytree(settings["teacher"]["path"], folder)
    run_file.write_text(json.dumps(settings | {"teacher": {"path": str(folder)}}))
    code, said = zygote.run("teacher", run_file, "--out", copy)
    assert code == 0, said
    code, said = zygote.run("verify", copy / "teacher")
    assert code == 0 and "0 files, 0 members, 0 bytes, 5 sources: sound" in said, said
    flip(folder / "config.json", 100)
    code, said = zygote.run("verify", copy / "teacher")
    assert code == 4 and f"{folder / 'config.json'}: the source is not what it was" in one_line(said), said
    shutil.rmtree(folder)
    code, said = zygote.run("verify", copy / "teacher")
    assert code == 0 and f"source {folder / 'config.json'} is gone: it was not compared" in said, said
