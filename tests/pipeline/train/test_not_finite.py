"""A loss or a gradient that is not finite: where a training stops, what it says, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from tiny_tasks import tiny_task

from capgap.kernels.sparse_kl import SparseKl
from capgap.pipeline.store import SequenceLoader
from capgap.pipeline.train import not_finite
from capgap.pipeline.train.data import training_loader
from capgap.pipeline.train.fit import fit
from capgap.pipeline.train.heads import served_head
from capgap.pipeline.train.kept_batches import load_batches
from capgap.pipeline.train.metrics import read_rows
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.replay import replay, setting_of
from capgap.pipeline.train.task import TrainingTask
from capgap.schemas.errors import InputError
from capgap.schemas.run_optimization import OptimizationSettings

SEQ_LEN, V = 16, 40


@pytest.fixture
def make_task(make_shards, tmp_path) -> Callable[..., TrainingTask]:
    def make(**settings: Any) -> TrainingTask:
        training = make_shards(tmp_path / "shards", "topk", 48)
        heldout = make_shards(tmp_path / "heldout", None, 6, seed=1)
        return tiny_task(tmp_path, training, heldout, {"batch_sequences": 4, "loggers": []} | settings, alpha=0.5)

    return make


def _overflowing(student, loader: SequenceLoader) -> Any:
    """One that says nothing finite after some token of the first micro-batch, which its head's trial does not see."""
    for token in loader.micro_batch(0).input_ids_BL.unique().tolist():
        row_H = student.model.embed_tokens.weight[token].detach().clone()
        with torch.no_grad():
            student.model.embed_tokens.weight[token] = torch.inf
        try:
            served_head(student, V)
        except InputError:
            with torch.no_grad():
                student.model.embed_tokens.weight[token] = row_H
        else:
            return student
    raise AssertionError("the trial sees every token of the micro-batch")


def _rows_at_fault(student, loader: SequenceLoader, number: int) -> list[int]:
    batch = loader.micro_batch(number)
    with torch.no_grad():
        logits_NV = student(input_ids=batch.input_ids_BL).logits[..., :V]
    nats_BL = torch.logsumexp(logits_NV, -1) - logits_NV.gather(2, batch.labels_BL[..., None])[..., 0]
    return (~nats_BL.isfinite()).any(1).nonzero().flatten().tolist()


def test_a_batch_that_overflows_stops_at_once_with_its_sequences_named_and_kept(
    make_task, make_student, tmp_path
) -> None:
    task = make_task(micro_batch_sequences=1, log_every_steps=100, checkpoint_every_steps=1, validate_every_steps=1)
    student, loader = make_student(tied=False), training_loader(task)
    # of a token that no sequence of the first two steps has
    first, trigger = _trigger(loader)
    with torch.no_grad():
        student.model.embed_tokens.weight[trigger] = torch.inf
    with pytest.raises(InputError) as caught:
        fit(student, task)
    (name,) = loader.names(first)
    assert f"training step {first // 4 + 1}: the loss is not finite; found nan at {name}, expected" in str(caught.value)
    assert {int(row["step"]) for row in read_rows(tmp_path / "metrics.csv")} == set(range(1, first // 4 + 1))
    assert max(int(path.stem[5:]) for path in (tmp_path / "work" / "checkpoints").glob("*.ckpt")) == first // 4
    ((kept,), setting) = load_batches(tmp_path / "work" / "not-finite")
    assert (kept.number, kept.sequences, kept.at_fault) == (first, [name], [name])
    assert (setting["step"], setting["what"], setting["value"]) == (first // 4 + 1, "loss", "nan")
    for key, value in loader.micro_batch(first).tensors().items():
        again = kept.batch.tensors()[key]
        assert (value is None and again is None) or torch.equal(value, again), key
    # the same command goes on from the sound checkpoint, and comes to it again
    with pytest.raises(InputError, match=f"training step {first // 4 + 1}: the loss is not finite"):
        fit(make_student(tied=False), task)


class Late:
    """An event of a GPU that is never over by itself."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        """What was copied is here."""


@pytest.mark.parametrize("every", [1, 100])
def test_flags_that_come_late_are_waited_for_before_anything_is_written(
    make_task, make_student, monkeypatch, every: int
) -> None:
    """As on a GPU, where a step does not wait: at most four micro-batches go on, and none past a checkpoint."""
    monkeypatch.setattr(not_finite, "_to_host", lambda flags: (flags.clone(), Late()))
    intervals = ("checkpoint_every_steps", "validate_every_steps", "log_every_steps")
    task = make_task(micro_batch_sequences=1, **dict.fromkeys(intervals, every))
    student, loader = make_student(tied=False), training_loader(task)
    first, trigger = _trigger(loader)
    with torch.no_grad():
        student.model.embed_tokens.weight[trigger] = torch.inf
    taken, training_step = [], DistillationModule.training_step

    def counted(module: DistillationModule, batch: Any, number: int) -> torch.Tensor:
        taken.append(number)
        return training_step(module, batch, number)

    monkeypatch.setattr(DistillationModule, "training_step", counted)
    with pytest.raises(InputError, match=f"training step {first // 4 + 1}: the loss is not finite"):
        fit(student, task)
    ends_step = first // 4 * 4 + 3
    assert max(taken) == (min(first + 4, ends_step) if every == 1 else first + 4)
    steps = [int(path.stem[5:]) for path in (task.folder / "work" / "checkpoints").glob("*.ckpt")]
    assert max(steps, default=0) == (first // 4 if every == 1 else 0)
    assert all(int(row["step"]) <= first // 4 for row in read_rows(task.folder / "metrics.csv"))


def _trigger(loader: SequenceLoader) -> tuple[int, int]:
    """The first micro-batch after two steps with a context that no earlier one has, and that token."""
    seen: set[int] = set()
    for number in range(len(loader)):
        tokens = set(loader.micro_batch(number).input_ids_BL.flatten().tolist())
        if number >= 8 and tokens - seen:
            return number, min(tokens - seen)
        seen |= tokens
    raise AssertionError("every token is in the first steps")


def test_of_a_batch_the_sequences_that_overflow_are_named_and_no_others(make_task, make_student) -> None:
    task = make_task(batch_sequences=24, max_tokens=24 * SEQ_LEN)
    loader = training_loader(task)
    student = _overflowing(make_student(tied=False), loader)
    names, expected = loader.names(0), _rows_at_fault(student, loader, 0)
    with pytest.raises(InputError, match="training step 1: the loss is not finite"):
        fit(student, task)
    ((kept,), _) = load_batches(task.folder / "work" / "not-finite")
    assert kept.sequences == names
    assert 0 < len(expected) < len(names)
    assert kept.at_fault == [names[row] for row in expected]


@pytest.mark.parametrize(("row", "sequence"), [(15, 0), (16, 1), (31, 1), (40, 2), (71, 3)])
def test_a_sequence_of_a_packed_row_with_padding_is_named_and_not_its_neighbour(
    make_task, make_student, row: int, sequence: int
) -> None:
    """Rows of 40 targets hold two sequences of 16 and padding; divided evenly, rows 16 to 19 would be the first's."""
    task = dataclasses.replace(make_task(), row_len=40)
    loader, module = training_loader(task), DistillationModule(make_student(), task.settings, 1, 0.0, 1.0, V)
    ce_N = torch.zeros(80)
    ce_N[row] = torch.nan
    module.last = SparseKl(ce_N.sum(), None, ce_N)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    setting = setting_of(task, make_student(), task.checkpoint_folder, 1)
    watch = not_finite.NotFinite(loader, 1, task.folder / "not-finite", setting)
    with pytest.raises(InputError, match="the loss is not finite"):
        watch.on_train_batch_end(trainer, module, None, loader.micro_batch(0), 0)
    ((kept,), _) = load_batches(task.folder / "not-finite")
    assert kept.at_fault == [loader.names(0)[sequence]]


def test_a_gradient_that_overflows_stops_its_step_and_keeps_all_that_it_added_up(make_task, make_student) -> None:
    """Losses are finite: the gradient of a weight that is multiplied with a huge one is not."""
    task = make_task(micro_batch_sequences=2, checkpoint_every_steps=1)
    student = make_student(tied=False)
    with torch.no_grad():
        student.model.norm.weight.fill_(1e-38)
        student.lm_head.weight.mul_(1e38)
        student.model.layers[-1].mlp.down_proj.weight.mul_(1e-30)
    with pytest.raises(InputError, match=r"training step 1: the gradient's norm is not finite; found (inf|nan) at"):
        fit(student, task)
    kept, setting = load_batches(task.folder / "work" / "not-finite")
    assert [one.number for one in kept] == [0, 1]
    assert setting["what"] == "gradient's norm"
    assert all(one.at_fault == one.sequences and len(one.sequences) == 2 for one in kept)
    assert list((task.folder / "work" / "checkpoints").iterdir()) == []
    assert read_rows(task.folder / "metrics.csv") == []


def test_a_kept_batch_is_computed_again_alone_by_the_line_that_is_said(make_task, make_student, tmp_path) -> None:
    student = _overflowing(make_student(tied=False), training_loader(make_task()))
    student.save_pretrained(tmp_path / "student")
    student = type(student).from_pretrained(tmp_path / "student")
    with pytest.raises(InputError) as caught:
        fit(student, make_task())
    command = re.search(r"alone: (\S+) (-m \S+) (\S+)$", str(caught.value))
    assert command is not None
    done = subprocess.run(
        [sys.executable, *command[2].split(), command[3]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    weights, computed = done.stdout.splitlines()
    assert weights == f"step 1: the loss was nan; weights of {tmp_path / 'student'}"
    assert computed.startswith("micro-batch 0: loss nan, gradient's norm ")
    # the same batch with sound weights is sound
    make_student(seed=1, tied=False).save_pretrained(tmp_path / "sound")
    _, computed = replay(Path(command[3]), str(tmp_path / "sound"))
    found = re.match(r"micro-batch 0: loss ([\d.]+), gradient's norm ([\d.]+); at fault was", computed)
    assert found is not None and 1 < float(found[1]) < 6


def test_a_replay_takes_the_newest_checkpoint(make_task, make_student, tmp_path) -> None:
    student = make_student(tied=False)
    student.save_pretrained(tmp_path / "student")
    student = type(student).from_pretrained(tmp_path / "student")
    task = make_task(learning_rate=1e30, checkpoint_every_steps=1, log_every_steps=1)
    with pytest.raises(InputError, match=r"training step \d+: the (loss|gradient's norm) is not finite"):
        fit(student, task)
    lines = list(replay(tmp_path / "work" / "not-finite"))
    assert re.search(r"weights of .*/work/checkpoints/step-0000000\d\.ckpt$", lines[0])
    assert "nan" in lines[1] or "inf" in lines[1], "its weights were at 1e30"


def test_a_batch_that_needs_an_online_teacher_is_kept_but_no_replay_is_recommended(make_task, make_student) -> None:
    """A replay without the teacher would compute another loss."""
    task = dataclasses.replace(make_task(), teacher=make_student(seed=1))
    reason = "the loss needs the teacher, which stood beside the student"
    with pytest.raises(InputError) as caught:
        fit(_overflowing(make_student(tied=False), training_loader(task)), task)
    folder = task.folder / "work" / "not-finite"
    assert str(caught.value).endswith(f"The batch is in {folder}; it cannot be computed again alone: {reason}")
    assert len(load_batches(folder)[0]) == 1
    with pytest.raises(InputError, match=f"{folder}: the batch cannot be computed again alone; found {reason}"):
        list(replay(folder))


def test_a_folder_without_a_kept_batch_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: holds no kept batch; found no not-finite.json"):
        list(replay(tmp_path))


def test_what_a_replay_must_know_is_plain_json(make_task, make_student) -> None:
    with pytest.raises(InputError):
        fit(_overflowing(make_student(tied=False), training_loader(make_task())), make_task())
    folder = make_task().folder / "work" / "not-finite"
    setting = json.loads((folder / "not-finite.json").read_bytes())
    assert setting["settings"]["batch_sequences"] == 4 and setting["alpha"] == 0.5 and setting["vocab_size"] == V
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(InputError, match="the model had no folder; name a model of the same shape"):
        list(replay(folder))
    assert DistillationModule(make_student(), OptimizationSettings(), 1, 0.5, 1.0, V).gradient_norm == 0
