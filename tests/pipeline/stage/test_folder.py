from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from capgap.pipeline.stage.folder import (
    LOCK_NAME,
    WORK_FOLDER,
    begin,
    clear,
    content_files,
    finish,
    finished_units,
    locked_folder,
    plan_units,
)
from capgap.pipeline.stage.identity import seal_of
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.workflow.state import states
from capgap.schemas.errors import MachineError
from capgap.schemas.manifest import MANIFEST_NAME, WORK_NAME

_HOLDER = """
import sys, time
from pathlib import Path
from capgap.pipeline.stage.folder import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""

# Python's own audit events say what is removed, in order.
_CLEAR = """
import sys
from pathlib import Path
from capgap.pipeline.stage.folder import clear
folder = Path(sys.argv[1])
def note(event, args):
    if event in ("os.remove", "shutil.rmtree") and Path(args[0]).parent == folder:
        print(Path(args[0]).name)
sys.addaudithook(note)
clear(folder)
"""


def _fill(folder: Path) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / WORK_FOLDER / "checkpoints").mkdir(parents=True)
    for name in ("shard-000000.tar", "model/config.json", "model/manifest.json", ".hidden", "work/plan.json",
                 "work/checkpoints/a.ckpt", MANIFEST_NAME, WORK_NAME, LOCK_NAME):  # fmt: skip
        (folder / name).write_text(name)


def test_the_content_is_every_file_of_the_result_in_order(tmp_path: Path) -> None:
    _fill(tmp_path)
    found = content_files(tmp_path)
    assert [file.path for file in found] == [".hidden", "model/config.json", "model/manifest.json", "shard-000000.tar"]
    assert [(file.num_bytes, file.sha256) for file in found] == [
        (len(file.path), hashlib.sha256(file.path.encode()).hexdigest()) for file in found
    ]


def test_what_is_half_written_is_no_content(tmp_path: Path) -> None:
    _fill(tmp_path)
    before = content_files(tmp_path)
    (tmp_path / "shard-000001.tar.partial-0123456789ab").write_text("half")
    assert content_files(tmp_path) == before


def test_an_empty_folder_has_no_content(tmp_path: Path) -> None:
    assert content_files(tmp_path) == ()


def test_clearing_leaves_the_lock_alone_and_nothing_else(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "elsewhere").symlink_to("/usr")
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert Path("/usr/bin").is_dir()


def test_clearing_begins_with_what_makes_the_folder_look_finished(tmp_path: Path) -> None:
    _fill(tmp_path)
    removed = subprocess.run(
        [sys.executable, "-c", _CLEAR, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert removed[:2] == [MANIFEST_NAME, WORK_NAME]
    assert sorted(removed[2:]) == [".hidden", "model", "shard-000000.tar", WORK_FOLDER]


def test_a_lock_is_one_processs_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "corpus"
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(MachineError, match=f"{folder}: another process is at work on this folder"),
            locked_folder(folder),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with locked_folder(folder):
        pass


def test_beginning_keeps_finished_work_and_removes_what_a_kill_left(make_run, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    (folder / WORK_FOLDER / "shards").mkdir(parents=True)
    for name in ("targets-000000.tar", "work/shards/targets-000000.json"):
        (folder / name).write_text("finished")
    for name in ("targets-000001.tar.partial-0123456789ab", "work/shards/targets-000001.json.partial-0123456789ab"):
        (folder / name).write_text("half")
    order = states(make_run())["corpus"].order
    begin(folder, order)
    left = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert left == ["targets-000000.tar", "work.json", "work/shards/targets-000000.json", "work/versions.json"]


def test_finishing_removes_the_work_and_makes_the_manifest_readable(make_run, make_finished) -> None:
    run = make_run()
    folder = states(run)["corpus"].folder
    plan_units(_made(folder) / WORK_FOLDER, "shards", 3, "*.json")
    assert read_manifest(folder) is None
    manifest = make_finished(run, "corpus")
    assert read_manifest(folder) == manifest
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST_NAME, "result.txt", WORK_NAME]
    sealed = finish(folder, manifest)
    assert read_manifest(folder) == sealed
    assert sealed.seal == seal_of(manifest)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("pattern", "names", "expected"),
    [
        ("shards/*.json", [], "0 of 12 units"),
        ("shards/*.json", ["shards/a.json", "shards/b.json", "shards/c.tar"], "2 of 12 units"),
        ("checkpoints/step-*.ckpt", ["checkpoints/step-0004.ckpt", "checkpoints/step-0008.ckpt"], "8 of 12 units"),
    ],
)
def test_finished_units_are_counted_or_named_by_their_step(
    tmp_path: Path, pattern: str, names: list[str], expected: str
) -> None:
    plan_units(tmp_path / "work", "units", 12, pattern)
    for name in names:
        (tmp_path / "work" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "work" / name).touch()
    assert finished_units(tmp_path / "work") == expected


@pytest.mark.parametrize("plan", [None, b"", b"{}", b"\xff"])
def test_without_a_plan_a_stage_is_just_begun(tmp_path: Path, plan: bytes | None) -> None:
    if plan is not None:
        (tmp_path / "plan.json").write_bytes(plan)
    assert finished_units(tmp_path) == "begun"
