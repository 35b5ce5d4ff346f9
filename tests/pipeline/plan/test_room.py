"""Before anything is made, the disk is asked for room."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capgap.jobs.cli import main
from capgap.pipeline.plan.room import require_disk_space
from capgap.pipeline.plan.work import work_of
from capgap.pipeline.workflow.graph import instances
from capgap.pipeline.workflow.state import RunStates
from capgap.schemas.errors import MachineError
from capgap.schemas.run_file import RunFile

DEMO = str(Path(__file__).parents[3] / "jobs" / "runs" / "demo.yaml")


def test_a_run_that_the_disk_has_no_room_for_is_refused_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    large = ["--student.model.hidden_size", "3145728", "--student.model.num_layers", "4096"]
    assert main(["run", DEMO, "--out", str(out), "--device", "cpu", *large]) == 3
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for words in ("the disk has no room", f"{tmp_path}", "B free", "the scratch of one stage takes", "capgap plan"):
        assert words in said
    assert not out.exists(), "nothing is made"


def test_what_folders_hold_already_is_not_asked_for_again(
    make_corpus_run: Callable[..., RunFile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = RunStates(make_corpus_run())
    coming = [one for one in instances(known.run) if one.stage == "corpus"]
    needed = sum(work_of(known.run, known.all(), None).disk_bytes(one.stage).value or 0 for one in coming)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(needed * 0.4)))
    with pytest.raises(MachineError, match="the disk has no room"):
        require_disk_space(known, coming)
    held = Path(known.run.out, "corpus", "half")
    held.parent.mkdir(parents=True)
    held.write_bytes(bytes(int(needed * 0.4)))
    with caplog.at_level(logging.WARNING, "capgap"):
        require_disk_space(known, coming)
    assert "the disk may be too small" in caplog.text and "0.00 GB" not in caplog.text
    caplog.clear()
    held.write_bytes(bytes(int(needed * 0.9)))
    with caplog.at_level(logging.WARNING, "capgap"):
        require_disk_space(known, coming)
    assert not caplog.text
