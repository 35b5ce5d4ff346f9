"""What a kill leaves behind, and what a result does not depend on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import Zygote

from capgap.pipeline.stage.folder import begin
from capgap.pipeline.stage.manifests import read_manifest
from capgap.pipeline.store.files import TEMP_MARK
from capgap.schemas.manifest import WorkOrder


def test_a_work_folder_that_a_kill_left_goes_with_the_next_command(zygote: Zygote, copy: Path, run_file: Path) -> None:
    """Killed after the manifest was written and before the work folder was gone."""
    work = copy / "train/distilled/seed-0/work"
    (work / "checkpoints").mkdir(parents=True)
    (work / "checkpoints/step-00000003.ckpt").write_bytes(b"old")
    before = (copy / "train/distilled/seed-0/manifest.json").read_bytes()
    code, said = zygote.run("verify", copy)
    assert code == 0, said
    code, said = zygote.run("train", run_file, "--out", copy)
    assert code == 0 and "is current" in said, said
    assert not work.exists()
    assert (copy / "train/distilled/seed-0/manifest.json").read_bytes() == before


def test_half_a_model_that_a_kill_left_is_no_content(zygote: Zygote, copy: Path, run_file: Path) -> None:
    """Killed while safetensors wrote, under a name of its own: neither counted nor kept."""
    student = copy / "student/seed-0"
    whole = read_manifest(student)
    assert whole is not None
    begin(student, WorkOrder.model_validate(whole.model_dump(include=set(WorkOrder.model_fields))))
    (student / "manifest.json").unlink()
    (student / "model" / ".tmpny05QV").write_bytes(b"half")
    (student / f"model{TEMP_MARK}0123456789ab").mkdir()
    (student / f"model{TEMP_MARK}0123456789ab" / ".tmpny05QV").write_bytes(b"half")
    code, said = zygote.run("student", run_file, "--out", copy)
    again = read_manifest(student)
    assert code == 0 and again is not None, said
    assert again.files == whole.files and again.content == whole.content
    assert [path for path in student.rglob("*") if ".tmp" in path.name or TEMP_MARK in path.name] == []


@pytest.mark.slow
def test_content_depends_neither_on_where_a_run_lay_nor_on_when_it_was_made(
    zygote: Zygote, made: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    given = shutil.copytree(Path(settings["teacher"]["path"]).parent, tmp_path / "moved")
    text = json.dumps(settings | {"name": "another"})
    (tmp_path / "run.json").write_text(text.replace(str(Path(settings["teacher"]["path"]).parent), str(given)))
    out = tmp_path / "elsewhere" / "out"
    for name in ("corpus", "teacher", "cache", "student/seed-0", "train/distilled/seed-0"):
        code, said = zygote.run(name.partition("/")[0], tmp_path / "run.json", "--out", out)
        assert code == 0, said
        contents = [json.loads((one / name / "manifest.json").read_text())["content"] for one in (made, out)]
        assert contents[0] == contents[1], name
