"""A power failure at any moment leaves no manifest, or a whole stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from power import MANIFEST_NAME, Operation, faults

from capgap.pipeline.stage.manifests import read_manifest

INSTANCES = ["corpus", "teacher", "cache", "student/seed-0", "train/distilled/seed-0"]


@pytest.fixture(scope="module")
def recorded(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Operation]]:
    """The run's folder, and what five stages did to its files; the teacher too is trained."""
    folder = tmp_path_factory.mktemp("power").resolve()
    shape = settings["student"]["model"]
    recipe = {name: settings["train"][name] for name in ("batch_sequences", "checkpoint_every_steps")}
    teacher = {"model": shape, "training": recipe | {"num_epochs": 1}}
    run = settings | {"out": str(folder / "out"), "teacher": teacher}
    run["corpus"] = settings["corpus"] | {"teacher_fraction": 0.3}
    (folder / "run.json").write_text(json.dumps(run))
    log = folder.parent / f"{folder.name}.log"
    command = [sys.executable, "-P", str(Path(__file__).with_name("power.py")), str(log), str(folder / "run.json")]
    subprocess.run([*command, *INSTANCES], check=True)
    return folder / "out", [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_after_every_operation_the_power_may_fail(recorded: tuple[Path, list[Operation]]) -> None:
    out, operations = recorded
    assert list(faults(operations, str(out.parent))) == []
    manifests = [o["to"] for o in operations if o["kind"] == "rename" and o["to"].endswith(f"/{MANIFEST_NAME}")]
    assert manifests == [str(out / name / MANIFEST_NAME) for name in INSTANCES]
    checkpoints = [o["path"] for o in operations if o["kind"] == "remove" and o["path"].endswith(".ckpt")]
    assert len(checkpoints) > 4, "or that checkpoints go last was not seen"


@pytest.mark.slow
def test_without_any_one_flush_of_what_a_manifest_lists_the_checker_would_say_so(
    recorded: tuple[Path, list[Operation]],
) -> None:
    out, operations = recorded
    listed = {
        str(out / name / file.path)
        for name in INSTANCES
        for file in read_manifest(out / name).files  # type: ignore[union-attr]
    }
    for path in sorted(listed):
        without = [o for o in operations if o["kind"] != "sync file" or not _is_of(o, path, operations)]
        assert any(path.rpartition("/")[2] in fault for fault in faults(without, str(out.parent))), path


def _is_of(operation: Operation, path: str, operations: list[Operation]) -> bool:
    """Whether a file that was flushed is the one of that path, perhaps under the name that it had before."""
    earlier = {o["path"] for o in operations if o["kind"] == "rename" and o["to"] == path}
    return operation["path"] == path or operation["path"] in earlier


ROOT, DIGEST = "/disk", "d" * 64
MANIFEST = json.dumps({"files": [{"path": "model/weights", "sha256": DIGEST}]})


def _folder(path: str, inode: int, **names: int) -> Operation:
    return {
        "kind": "sync folder",
        "path": path,
        "inode": inode,
        "names": {n.replace("_", "."): i for n, i in names.items()},
    }


WEIGHTS = {"kind": "sync file", "path": "/disk/out/model/weights", "inode": 4, "sha256": DIGEST}
RENAME = {
    "kind": "rename",
    "path": "/disk/out/manifest.json.partial",
    "to": "/disk/out/manifest.json",
    "text": MANIFEST,
}
FLUSHED = [
    WEIGHTS,
    _folder("/disk/out/model", 3, weights=4),
    _folder("/disk/out", 2, model=3, work=5),
    _folder("/disk", 1, out=2),
]
FINISHED = [*FLUSHED, RENAME, _folder("/disk/out", 2, model=3, work=5, manifest_json=6)]
CHECKPOINT = {"kind": "remove", "path": "/disk/out/work/checkpoints/step-4.ckpt"}


def test_a_stage_that_is_flushed_before_its_manifest_is_sound() -> None:
    flushed = {"kind": "sync file", "path": "/disk/out/manifest.half", "inode": 6, "sha256": "e" * 64}
    assert list(faults([flushed, *FINISHED, CHECKPOINT], ROOT)) == []


@pytest.mark.parametrize("left_out", range(len(FLUSHED)))
def test_whatever_flush_is_left_out_is_a_fault(left_out: int) -> None:
    # what follows the manifest may flush the rest; the power may fail before
    operations = [*FLUSHED[:left_out], *FLUSHED[left_out + 1 :], RENAME]
    assert list(faults(operations, ROOT))


@pytest.mark.parametrize(
    "after",
    [
        pytest.param({"kind": "remove", "path": "/disk/out/model/weights"}, id="a file that is listed goes"),
        pytest.param(WEIGHTS | {"sha256": "f" * 64}, id="it is written anew"),
        pytest.param(
            {"kind": "rename", "path": "/disk/out/model", "to": "/disk/old", "text": ""}, id="its folder goes"
        ),
    ],
)
def test_what_is_done_to_listed_files_while_the_manifest_may_stand_is_a_fault(after: Operation) -> None:
    assert list(faults([*FINISHED, after], ROOT))
    gone = {"kind": "remove", "path": "/disk/out/manifest.json"}
    # that the manifest is gone must have reached the disk first
    assert list(faults([*FINISHED, gone, after], ROOT))
    assert list(faults([*FINISHED, gone, _folder("/disk/out", 2, model=3), after], ROOT)) == []


def test_a_checkpoint_that_goes_before_the_manifest_is_there_is_a_fault() -> None:
    assert list(faults([*FLUSHED, RENAME, CHECKPOINT], ROOT))
    saved = {"kind": "sync file", "path": "/disk/out/work/checkpoints/step-8.saving", "inode": 9, "sha256": DIGEST}
    folders = [
        _folder("/disk/out/work/checkpoints", 7, **{"step-8_ckpt": 9}),
        _folder("/disk/out/work", 5, checkpoints=7),
    ]
    assert list(faults([*FLUSHED, saved, *folders, CHECKPOINT], ROOT)) == []
    assert list(faults([*FLUSHED, *folders, CHECKPOINT], ROOT))
