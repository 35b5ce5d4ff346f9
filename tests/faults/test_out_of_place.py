"""Folders in the place of files, files in that of folders, links, notes that say anything: a line, or no harm.

Each is tried through the commands that meet it. None is a fault of capgap's, and none is passed over in silence.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Zygote, one_line

from capgap.pipeline.stage.folder import finished_units
from capgap.pipeline.stage.heartbeat import read_heartbeats

TRAIN = "train/distilled/seed-0"


def folder_at(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def unfinished(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    (folder / "work").mkdir(exist_ok=True)
    return folder / "work"


PLACES: dict[str, tuple[str, tuple[str, ...], str]] = {
    # what is a folder now, the command, and what is named
    "work order": ("cache/work.json", ("verify", "OUT"), "cache/work.json"),
    "manifest": ("cache/manifest.json", ("cache", "RUN"), "cache/manifest.json"),
    "manifest of a training": (f"{TRAIN}/manifest.json", ("train", "RUN"), f"{TRAIN}/manifest.json"),
    "quarantine": ("cache/quarantine.json", ("verify", "--quarantine", "OUT"), "cache/quarantine.json"),
    "lock": ("cache/.lock", ("cache", "RUN"), "cache/.lock"),
    "run file": ("run.resolved.json", ("run", "RUN", "--only", "cache", "--force"), "run.resolved.json"),
    "weights": ("student/seed-0/model/model.safetensors", ("verify", "OUT"), "model.safetensors"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_folder_in_the_place_of_a_file_is_one_line(zygote: Zygote, copy: Path, run_file: Path, place: str) -> None:
    path, words, named = PLACES[place]
    folder_at(copy / path)
    where = {"OUT": [copy], "RUN": [run_file, "--out", copy]}
    code, said = zygote.run(*[one for word in words for one in where.get(word, [word])])
    assert code in (2, 4), said
    assert named in one_line(said)


def test_a_file_in_the_place_of_a_folder_is_one_line(zygote: Zygote, copy: Path, run_file: Path) -> None:
    (unfinished(copy / TRAIN) / "checkpoints").write_text("no folder")
    code, said = zygote.run("train", run_file, "--out", copy)
    assert code == 2, said
    assert "something else stands where a folder belongs" in one_line(said)


def test_a_stage_behind_a_link_is_verified_and_listed_too(zygote: Zygote, copy: Path) -> None:
    shutil.move(copy / "cache", copy.parent / "elsewhere")
    (copy / "cache").symlink_to(copy.parent / "elsewhere")
    # round and round
    (copy / "corpus" / "logs").mkdir(exist_ok=True)
    (copy / "corpus" / "logs" / "up").symlink_to(copy)
    code, said = zygote.run("verify", copy)
    assert code == 0 and said.count("cache: ") == 1, said
    code, said = zygote.run("ls", copy.parent)
    assert "5 finished" in said, said
    shard = next((copy.parent / "elsewhere").glob("sampled-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, said = zygote.run("verify", copy)
    assert code == 4, said
    assert shard.name in one_line(said)


PLANS = {
    "a list": "[1]",
    "another type": '{"unit": 1, "total": "x", "pattern": "*"}',
    "outside": '{"unit": "u", "total": 1, "pattern": "../../**/*"}',
    "absolute": '{"unit": "u", "total": 1, "pattern": "/etc/*"}',
    "depth": "[" * 100_000,
    "bytes": "\x00",
    "no pattern": '{"unit": "u", "total": 1, "pattern": "**x"}',
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_note_of_the_work_to_do_may_hold_anything(tmp_path: Path, plan: str) -> None:
    (tmp_path / "plan.json").write_text(PLANS[plan])
    assert finished_units(tmp_path) in ("begun", "0 of 1 u")


def test_files_that_are_called_like_steps_and_are_none_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"unit": "steps", "total": 9, "pattern": "step-*"}')
    for name in ("step-x.ckpt", "step-.ckpt", f"step-{'9' * 5000}"[:200], "step-00000003.ckpt"):
        (tmp_path / name).touch()
    assert finished_units(tmp_path) == "3 of 9 steps"


@pytest.mark.parametrize("pid", [-1, 0, 1 << 31, 1 << 62, 1 << 70])
def test_a_heartbeat_of_no_process_is_none(tmp_path: Path, pid: int) -> None:
    beat: dict[str, Any] = {"machine": os.uname().nodename, "namespace": "", "pid": pid, "pid_started": None}
    beat |= {"phase": "x", "device": "", "begun_s": 0, "advanced_s": 0, "written_s": 0}
    (tmp_path / "progress.json").write_text(json.dumps(beat))
    assert read_heartbeats(tmp_path) == []


ODD: dict[str, Callable[[Path], object]] = {
    "odd name": lambda folder: (folder / "step-x.ckpt").touch(),
    "a folder": lambda folder: (folder / "step-00000003.ckpt").mkdir(),
    "deep versions": lambda folder: (folder.parent / "versions.json").write_text("[" * 100_000),
    "other versions": lambda folder: (folder.parent / "versions.json").write_text('[{"torch": 1}]'),
}


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_a_training_goes_on_past_what_is_no_checkpoint(
    zygote: Zygote, copy: Path, made: Path, run_file: Path, odd: str
) -> None:
    checkpoints = unfinished(copy / TRAIN) / "checkpoints"
    checkpoints.mkdir()
    ODD[odd](checkpoints)
    code, said = zygote.run("train", run_file, "--out", copy)
    assert code == 0, said
    contents = [json.loads((out / TRAIN / "manifest.json").read_text())["content"] for out in (copy, made)]
    assert contents[0] == contents[1]
