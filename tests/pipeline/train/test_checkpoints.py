"""Which checkpoint a training goes on from, and which stay."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import pytest
import torch
from tiny_tasks import tiny_task

from capgap.pipeline.train import heldout
from capgap.pipeline.train.checkpoints import Checkpoints, checkpoint_to_resume
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heldout import HeldOutFigures
from capgap.pipeline.train.saved import fault_of, read_checkpoint, write_part


def _file(path: Path, step: int = 0) -> Path:
    write_part({"state_dict": {"weight": torch.full((1000,), float(step))}, "step": step}, path)
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    for rank in range(2):
        write_part({"step": 1}, path / f"rank-{rank:05d}.pt", 2)
    return path


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_taken_and_what_was_being_saved_is_removed(tmp_path) -> None:
    for step in (9, 10):
        _file(tmp_path / f"step-{step:08d}.ckpt", step)
    (tmp_path / "step-00000020.saving").touch()
    _folder(tmp_path / "step-00000030.saving")
    _file(tmp_path / "best-00000008.ckpt")
    _file(tmp_path / "best-00000012.ckpt")
    assert checkpoint_to_resume(tmp_path) == tmp_path / "step-00000010.ckpt"
    assert _names(tmp_path) == ["best-00000008.ckpt", "step-00000009.ckpt", "step-00000010.ckpt"]
    assert read_checkpoint(tmp_path / "step-00000010.ckpt")["step"] == 10


def test_a_new_training_has_none(tmp_path) -> None:
    assert checkpoint_to_resume(tmp_path / "checkpoints") is None


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage) -> None:
    for step in (10, 20, 30):
        _file(tmp_path / f"step-{step:08d}.ckpt", step)
    damage(tmp_path / "step-00000030.ckpt")
    damage(tmp_path / "step-00000020.ckpt")
    with caplog.at_level(logging.WARNING, "capgap"):
        assert checkpoint_to_resume(tmp_path) == tmp_path / "step-00000010.ckpt"
    for line, step in zip(caplog.messages, (30, 20), strict=True):
        assert line.startswith(f"{tmp_path}/step-000000{step}.ckpt is damaged (") and "the one before it" in line
    assert _names(tmp_path) == ["step-00000010.ckpt"]


def test_a_checkpoint_that_lacks_a_rank_is_damaged(tmp_path) -> None:
    path = _folder(tmp_path / "step-00000010.ckpt")
    assert fault_of(path) == ""
    (path / "rank-00001.pt").unlink()
    assert fault_of(path) == "1 of 2 files"
    (path / "rank-00000.pt").unlink()
    assert fault_of(path)


class _Touch:
    """Runs code where it is read as a pickle."""

    def __reduce__(self):
        return (print, ("run",))


def test_a_checkpoint_is_never_run_as_code(tmp_path, capsys) -> None:
    path = tmp_path / "step-00000010.ckpt"
    torch.save({"num_parts": 1, "checkpoint": _Touch()}, path)
    assert "UnpicklingError" in fault_of(path)
    assert checkpoint_to_resume(tmp_path) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, ["best-00000030.ckpt", "best-00000045.ckpt", "step-00000040.ckpt"]),
        (3, ["best-00000015.ckpt", "best-00000030.ckpt", "best-00000045.ckpt", "step-00000020.ckpt",
             "step-00000030.ckpt", "step-00000040.ckpt"]),
    ],
)  # fmt: skip
def test_the_last_ones_stay_and_for_each_of_them_the_best_of_its_time(tmp_path, keep: int, left: list[str]) -> None:
    names = [f"step-{step:08d}.ckpt" for step in (10, 20, 30, 40)] + [f"best-{s:08d}.ckpt" for s in (5, 15, 25, 30, 45)]
    for name in names:
        (tmp_path / name).touch()
    Checkpoints(tmp_path, 10, 1, keep, 0, None)._delete_old()
    assert _names(tmp_path) == left


def test_where_no_held_out_loss_is_a_number_the_last_weights_are_handed_on_with_a_warning(
    make_shards, make_student, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(heldout, "measure", lambda *given: HeldOutFigures(math.nan))
    training, text = make_shards(tmp_path / "shards", "topk", 12), make_shards(tmp_path / "text", None, 6, seed=1)
    students, totals = {}, {}
    for output in ("best", "last"):
        folder = tmp_path / output
        folder.mkdir()
        students[output] = make_student()
        settings = {"batch_sequences": 4, "validate_every_steps": 1, "loggers": [], "output": output}
        with caplog.at_level(logging.WARNING, "capgap"):
            totals[output] = fit(students[output], tiny_task(folder, training, text, settings))
    assert totals["best"] == totals["last"]
    assert caplog.messages == [
        "no held-out loss was a finite number: output: best hands on the weights of the last step"
    ]
    for one, other in zip(students["best"].parameters(), students["last"].parameters(), strict=True):
        assert torch.equal(one, other)
